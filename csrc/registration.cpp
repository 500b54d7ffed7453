// The operators' schemas, and the Python module whose import registers them.
#include <Python.h>

#include "cpu.h"

// `step` returns the index of the first parameter that does not fit the bucket's table and then has written nothing;
// -1 after a step. The tensors that stand for a parameter without gradient have no elements.
STABLE_TORCH_LIBRARY(fused_adamp, m) {
  m.def(
      "step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
      "Tensor(d!)[] steps, Tensor(e!) decisions, Tensor(f!) sums, Tensor table, Tensor scalars, int dtype, "
      "bool adaptive, bool check_only) -> int");
  m.def("advise_huge_pages(Tensor storage) -> ()");
  m.def("layout() -> int");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_adamp, CompositeExplicitAutograd, m) {
  m.impl("step", &fused_adamp::step);
  m.impl("advise_huge_pages", TORCH_BOX(&fused_adamp::advise_huge_pages));
  m.impl("layout", TORCH_BOX(&fused_adamp::layout));
  m.impl("instruction_set", TORCH_BOX(&fused_adamp::instruction_set));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers the operators of fused_adamp.", -1,
                               nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
