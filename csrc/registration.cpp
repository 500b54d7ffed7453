// The operators' schemas, and the Python module whose import registers them.
#include <Python.h>

#include "cpu.h"
#include "host.h"

// A bucket's tensors in one step, fused_adamp/batch.py, Batch. A list is empty if the members have none of that kind. The
// tensors of a member without gradient have no elements. If all state of a kind is contiguous and has one dtype
// (`state_dtype` for moments), its list may hold the table of its addresses instead. `shared` is empty if no member lies on
// several ranks; else it holds the tensors of Shared, and `swept` and `shrink`, which fused_adamp/backends/cpu.py keeps
// between measure and step.
#define FUSED_ADAMP_BATCH(weight, m, v, remainder, step, seed, decisions, results, shared)                                  \
  "(Tensor" weight "[] params, Tensor[] grads, Tensor" m "[] first_moments, Tensor" v "[] second_moments, "                 \
  "Tensor" remainder "[] remainders, Tensor" step "[] steps, Tensor" seed "[] seeds, Tensor" decisions " decisions, "       \
  "Tensor" results " results, Tensor(i!) sums, Tensor table, Tensor scalars, float scale, int dtype, int state_dtype, "      \
  "bool adaptive, Tensor" shared "[] shared, bool final)"

// `step` and `first_stale` return the index of the first member that does not fit the bucket's table, -1 if all do. If the
// index is not -1, `step` has changed nothing. `measure` writes the shares; with `final` it may move weights by a guess,
// which `step` corrects.
// `square_norm` returns the sum of the squares of the gradients, or -1 if a member does not fit.
STABLE_TORCH_LIBRARY(fused_adamp, m) {
  m.def("measure" FUSED_ADAMP_BATCH("(a!)", "(b!)", "(c!)", "(d!)", "(e!)", "", "", "", "(j!)") " -> ()");
  m.def("step" FUSED_ADAMP_BATCH("(a!)", "(b!)", "(c!)", "(d!)", "(e!)", "(f!)", "(g!)", "(h!)", "(j!)") " -> int");
  m.def("first_stale" FUSED_ADAMP_BATCH("", "", "", "", "", "", "", "", "") " -> int");
  m.def("square_norm" FUSED_ADAMP_BATCH("", "", "", "", "", "", "", "", "") " -> float");
  m.def("advise_huge_pages(Tensor storage) -> ()");
  m.def("layout() -> int");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_adamp, CompositeExplicitAutograd, m) {
  m.impl("measure", &fused_adamp::measure);
  m.impl("step", &fused_adamp::step);
  m.impl("first_stale", &fused_adamp::first_stale);
  m.impl("square_norm", &fused_adamp::square_norm);
  m.impl("advise_huge_pages", TORCH_BOX(&fused_adamp::advise_huge_pages));
  m.impl("layout", TORCH_BOX(&fused_adamp::layout));
  m.impl("instruction_set", TORCH_BOX(&fused_adamp::instruction_set));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers the operators of fused_adamp.", -1,
                               nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* made = PyModule_Create(&module);
  if (made && fused_adamp::add_host_functions(made) < 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
