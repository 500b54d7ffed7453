// The operators' schemas, and the Python module whose import registers them.
#include <Python.h>

#include "cpu.h"

// A bucket's tensors in one step, fused_adamp/batch.py, Batch. A list is empty where the members have none of that kind;
// what stands for a member without gradient has no elements. Instead of several members' state, a list may hold the table
// of where it lies, if all of it is contiguous and has one dtype: of moments `state_dtype`. `shared` is empty where no
// member lies on several ranks; else it holds the tensors of Shared, and what fused_adamp/backends/cpu.py keeps between measure and step: `swept` and `shrink`.
#define FUSED_ADAMP_BATCH(weight, m, v, remainder, step, seed, decisions, results, shared)                                  \
  "(Tensor" weight "[] params, Tensor[] grads, Tensor" m "[] first_moments, Tensor" v "[] second_moments, "                 \
  "Tensor" remainder "[] remainders, Tensor" step "[] steps, Tensor" seed "[] seeds, Tensor" decisions " decisions, "       \
  "Tensor" results " results, Tensor(i!) sums, Tensor table, Tensor scalars, float scale, int dtype, int state_dtype, "      \
  "bool adaptive, Tensor" shared "[] shared, bool final)"

// `step` and `first_stale` return the index of the first member that does not fit the bucket's table, -1 if all do; `step`
// has moved nothing then. `measure` writes the shares, and with `final` moves what step will only have to put right.
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
  return PyModule_Create(&module);
}
