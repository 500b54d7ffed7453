// The functions of the Python module that pass over a bucket's tensors on the host: fused_adamp/host.py.
#pragma once

#include <Python.h>

namespace fused_adamp {

// Adds the functions to the module, unless torch's Tensor lacks DLPack's C interface, which they read tensors by. Returns
// -1 with a Python error if that fails.
int add_host_functions(PyObject* module);

}  // namespace fused_adamp
