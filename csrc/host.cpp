// Passes over a bucket's tensors, as Python objects. fused_adamp/host.py has the same functions in Python and says what
// they do. A registered operator would cost 0.15 us for each tensor that it is passed; DLPack's C interface, which reads a
// tensor where it is, costs 0.03 to 0.06 us.
#include "host.h"

#include <cstdint>
#include <cstring>
#include <vector>

namespace fused_adamp {

namespace {

// DLPack 1.3, dlpack.h: what a tensor looks like, and the functions of a framework. torch's copy of the header is not part
// of the stable ABI; DLPack's structs are stable within a major version.
struct View {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;
  void *allocate, *export_owned, *import_owned;
  int (*view)(void* tensor, View* view);  // borrows; waits for no stream
  void* stream;
};
constexpr uint32_t dlpack_major = 1;

const Exchange* exchange = nullptr;
PyObject *tensor_type, *grad_name, *untyped_storage_name, *nbytes_name, *data_ptr_name;

constexpr int64_t widest_load = 16;  // fused_adamp/host.py, WIDEST_LOAD
constexpr long version = 1;          // fused_adamp/host.py, _VERSION: counted up whenever the functions change

// A reference that is given back at the end of its scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

PyObject* new_reference(PyObject* object) {
  Py_XINCREF(object);
  return object;
}

int64_t items(const View& view) {
  int64_t count = 1;
  for (int32_t d = 0; d < view.ndim; ++d) count *= view.sizes[d];
  return count;
}

// A number that a method of the object returns; -1 with a Python error if it fails.
int64_t number_of(PyObject* object, PyObject* method) {
  const Owned number(PyObject_CallMethodObjArgs(object, method, nullptr));
  return number ? PyLong_AsLongLong(number.get()) : -1;
}

// Whether all elements lie inside the tensor's storage: fused_adamp/tensors.py.
bool has_storage(PyObject* tensor, const View& view) {
  if (items(view) == 0) return true;
  if (!view.data) return false;
  int64_t reach = 1;
  for (int32_t d = 0; d < view.ndim; ++d) reach += (view.sizes[d] - 1) * view.strides[d];
  const Owned storage(PyObject_CallMethodObjArgs(tensor, untyped_storage_name, nullptr));
  const int64_t bytes = storage ? number_of(storage.get(), nbytes_name) : -1;
  const int64_t begin = bytes < 0 ? -1 : number_of(storage.get(), data_ptr_name);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return reinterpret_cast<int64_t>(view.data) - begin + reach * view.bits / 8 <= bytes;
}

// The words of a tensor's layout: dimensions, dtype and device in one, then sizes and strides.
int64_t kind_of(const View& view) {
  return view.ndim | int64_t(view.code) << 8 | int64_t(view.bits) << 16 | int64_t(view.device_type) << 24 |
         int64_t(view.device_id) << 40;
}

bool same_layout(const View& view, const int64_t* words, int64_t left) {
  if (left < 1 || words[0] != kind_of(view) || left < 1 + 2 * view.ndim) return false;
  for (int32_t d = 0; d < view.ndim; ++d)
    if (words[1 + d] != view.sizes[d] || words[1 + view.ndim + d] != view.strides[d]) return false;
  return true;
}

// Distinct objects even if they are empty, which Python's bytes are not.
PyObject* bytearray_of(const std::vector<int64_t>& words) {
  return PyByteArray_FromStringAndSize(reinterpret_cast<const char*>(words.data()), 8 * words.size());
}

PyObject* pair_of(PyObject* addresses, PyObject* layout) {
  const Owned first(addresses), second(layout);
  return first && second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
}

// New marks. They are empty if a tensor cannot be viewed, or has elements and no address.
PyObject* new_marks(PyObject* tensors) {
  std::vector<int64_t> addresses, layout;
  for (Py_ssize_t i = 0, count = PyList_Size(tensors); i < count; ++i) {
    View view;
    const bool viewed = exchange->view(PyList_GetItem(tensors, i), &view) == 0;
    if (!viewed || (!view.data && items(view) != 0)) {
      PyErr_Clear();
      addresses.clear();
      layout.clear();
      break;
    }
    addresses.push_back(reinterpret_cast<int64_t>(view.data));
    layout.push_back(kind_of(view));
    layout.insert(layout.end(), view.sizes, view.sizes + view.ndim);
    layout.insert(layout.end(), view.strides, view.strides + view.ndim);
  }
  return pair_of(bytearray_of(addresses), bytearray_of(layout));
}

// marks(addresses, layout, tensors)
PyObject* marks(PyObject*, PyObject* arguments) {
  PyObject *old_addresses, *old_layout, *tensors;
  if (!PyArg_ParseTuple(arguments, "OOO", &old_addresses, &old_layout, &tensors)) return nullptr;
  const Py_ssize_t count = PyList_Size(tensors);
  if (count < 0) return nullptr;
  if (!PyByteArray_Check(old_addresses) || !PyByteArray_Check(old_layout)) return new_marks(tensors);
  if (PyByteArray_Size(old_addresses) != 8 * count) return new_marks(tensors);
  const auto* addresses = reinterpret_cast<const int64_t*>(PyByteArray_AsString(old_addresses));
  const auto* layout = reinterpret_cast<const int64_t*>(PyByteArray_AsString(old_layout));
  int64_t left = PyByteArray_Size(old_layout) / 8;
  std::vector<int64_t> moved;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Owned tensor(new_reference(PyList_GetItem(tensors, i)));
    View view;
    if (exchange->view(tensor.get(), &view)) {
      PyErr_Clear();
      return new_marks(tensors);
    }
    if (!same_layout(view, layout, left)) return new_marks(tensors);
    layout += 1 + 2 * view.ndim;
    left -= 1 + 2 * view.ndim;
    const auto address = reinterpret_cast<int64_t>(view.data);
    if (address == addresses[i]) continue;
    if ((address - addresses[i]) % widest_load || !has_storage(tensor.get(), view)) return new_marks(tensors);
    if (moved.empty()) moved.assign(addresses, addresses + count);
    moved[i] = address;
  }
  if (moved.empty()) Py_RETURN_NONE;
  return pair_of(bytearray_of(moved), new_reference(old_layout));
}

// are_same(first, second)
PyObject* are_same(PyObject*, PyObject* arguments) {
  PyObject *first, *second;
  if (!PyArg_ParseTuple(arguments, "OO", &first, &second)) return nullptr;
  const Py_ssize_t count = PyList_Size(first);
  if (count < 0) return nullptr;
  if (count != PyList_Size(second)) return PyErr_Occurred() ? nullptr : PyBool_FromLong(0);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (PyList_GetItem(first, i) != PyList_GetItem(second, i)) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
}

// are_tensors(objects)
PyObject* are_tensors(PyObject*, PyObject* objects) {
  for (Py_ssize_t i = 0, count = PyList_Size(objects); i < count; ++i) {
    const int is_tensor = PyObject_IsInstance(PyList_GetItem(objects, i), tensor_type);
    if (is_tensor <= 0) return is_tensor < 0 ? nullptr : PyBool_FromLong(0);
  }
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(1);
}

// gradients(params, absent)
PyObject* gradients(PyObject*, PyObject* arguments) {
  PyObject *params, *absent;
  if (!PyArg_ParseTuple(arguments, "OO", &params, &absent)) return nullptr;
  const Py_ssize_t count = PyList_Size(params);
  if (count < 0) return nullptr;
  Owned found(PyList_New(count));
  Py_ssize_t present = 0;
  for (Py_ssize_t i = 0; found && i < count; ++i) {
    const Owned p(new_reference(PyList_GetItem(params, i)));
    PyObject* grad = PyObject_GetAttr(p.get(), grad_name);
    if (!grad) return nullptr;
    if (grad == Py_None) {
      Py_DECREF(grad);
      grad = new_reference(absent);
    } else {
      ++present;
    }
    PyList_SetItem(found.get(), i, grad);
  }
  return found ? Py_BuildValue("(Nn)", found.release(), present) : nullptr;
}

// present(members, grads, absent)
PyObject* present(PyObject*, PyObject* arguments) {
  PyObject *members, *grads, *absent;
  if (!PyArg_ParseTuple(arguments, "OOO", &members, &grads, &absent)) return nullptr;
  const Py_ssize_t count = PyList_Size(grads);
  Py_ssize_t missing = 0;
  for (Py_ssize_t i = 0; i < count; ++i) missing += PyList_GetItem(grads, i) == absent;
  if (count < 0) return nullptr;
  if (!missing) return new_reference(members);
  Owned found(PyList_New(0));
  for (Py_ssize_t i = 0; found && i < count; ++i) {
    if (PyList_GetItem(grads, i) == absent) continue;
    PyObject* member = PyList_GetItem(members, i);
    if (!member || PyList_Append(found.get(), member)) return nullptr;
  }
  return found.release();
}

// Finds the state of one parameter after the other. They are most often in the order of the state, so that no parameter
// has to be hashed, which Tensor does in Python.
class StateOf {
 public:
  explicit StateOf(PyObject* state) : state_(state) {}

  // Borrowed; null if there is none, with or without a Python error.
  PyObject* operator()(PyObject* p) {
    PyObject *key, *value;
    while (in_order_ && (in_order_ = PyDict_Next(state_, &position_, &key, &value)))
      if (key == p) return value;
    return PyDict_GetItemWithError(state_, p);
  }

 private:
  PyObject* state_;
  Py_ssize_t position_ = 0;
  bool in_order_ = true;
};

// A new reference to an entry of a parameter's state; null if there is none, with or without a Python error.
PyObject* entry_of(PyObject* state, PyObject* name) {
  if (PyDict_Check(state)) return new_reference(PyDict_GetItemWithError(state, name));
  PyObject* entry = PyObject_GetItem(state, name);
  if (!entry && PyErr_ExceptionMatches(PyExc_KeyError)) PyErr_Clear();
  return entry;
}

// entries(params, grads, state, names, absent)
PyObject* entries(PyObject*, PyObject* arguments) {
  PyObject *params, *grads, *state, *names, *absent;
  if (!PyArg_ParseTuple(arguments, "OOO!OO", &params, &grads, &PyDict_Type, &state, &names, &absent)) return nullptr;
  const Py_ssize_t count = PyList_Size(params), kinds = PyTuple_Size(names);
  if (count < 0 || kinds < 0) return nullptr;
  Owned found(PyList_New(kinds));
  if (!found) return nullptr;
  std::vector<PyObject*> lists;
  for (Py_ssize_t k = 0; k < kinds; ++k) {
    PyObject* list = PyList_New(count);
    if (!list) return nullptr;
    PyList_SetItem(found.get(), k, list);
    lists.push_back(list);
  }
  StateOf state_of(state);
  for (Py_ssize_t i = 0; kinds && i < count; ++i) {
    PyObject *p = PyList_GetItem(params, i), *g = PyList_GetItem(grads, i);
    if (!g) return nullptr;
    const Owned own(new_reference(g == absent ? nullptr : state_of(p)));
    for (Py_ssize_t k = 0; k < kinds; ++k) {
      PyObject* entry = g == absent ? new_reference(absent) : own ? entry_of(own.get(), PyTuple_GetItem(names, k)) : nullptr;
      if (!entry) {
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
      }
      PyList_SetItem(lists[k], i, entry);
    }
  }
  return found.release();
}

PyMethodDef functions[] = {{"marks", marks, METH_VARARGS, nullptr},
                           {"are_same", are_same, METH_VARARGS, nullptr},
                           {"are_tensors", are_tensors, METH_O, nullptr},
                           {"gradients", gradients, METH_VARARGS, nullptr},
                           {"present", present, METH_VARARGS, nullptr},
                           {"entries", entries, METH_VARARGS, nullptr},
                           {nullptr, nullptr, 0, nullptr}};

}  // namespace

int add_host_functions(PyObject* module) {
  const Owned torch(PyImport_ImportModule("torch"));
  if (!torch) return -1;
  tensor_type = PyObject_GetAttrString(torch.get(), "Tensor");
  if (!tensor_type) return -1;
  const Owned capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  if (capsule) exchange = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  PyErr_Clear();
  while (exchange && exchange->major > dlpack_major) exchange = exchange->previous;
  if (!exchange || exchange->major != dlpack_major || !exchange->view) return 0;
  grad_name = PyUnicode_InternFromString("grad");
  untyped_storage_name = PyUnicode_InternFromString("untyped_storage");
  nbytes_name = PyUnicode_InternFromString("nbytes");
  data_ptr_name = PyUnicode_InternFromString("data_ptr");
  if (!grad_name || !untyped_storage_name || !nbytes_name || !data_ptr_name) return -1;
  if (PyModule_AddIntConstant(module, "host", version)) return -1;
  return PyModule_AddFunctions(module, functions);
}

}  // namespace fused_adamp
