// PyTorch's tensors and state as the bindings read them, without Python in between: metadata through DLPack, functions
// of ``torch`` that are looked up once. For bindings.cpp alone.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dlpack.h"

namespace py = pybind11;

namespace {

// DLPack function table of torch.Tensor.
const DLPackExchangeAPI& exchange() {
  static const DLPackExchangeAPI* known = nullptr;
  if (!known) {
    const py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    const void* found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!found) throw py::error_already_set();
    const auto* api = static_cast<const DLPackExchangeAPI*>(found);
    while (api && api->version.major != 1) api = api->prev_api;
    if (!api || !api->dltensor_from_py_object_no_sync)
      throw std::runtime_error("PyTorch's tensors: expected version 1 of DLPack's C interface, got another");
    known = api;
  }
  return *known;
}

// An attribute of a Python module, or of a class in it, alive until the interpreter exits.
PyObject* attribute(const char* module, const char* name, const char* member = nullptr) {
  py::object found = py::module_::import(module).attr(name);
  if (member) found = found.attr(member);
  return found.release().ptr();
}

PyObject* interned(const char* name) {
  PyObject* const text = PyUnicode_InternFromString(name);
  if (!text) throw py::error_already_set();
  return text;
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object call(PyObject* function) { return checked(PyObject_CallNoArgs(function)); }

py::object call(PyObject* function, py::handle argument) {
  return checked(PyObject_CallOneArg(function, argument.ptr()));
}

int64_t integer(py::handle number) {
  const int64_t value = PyLong_AsLongLong(number.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Defines a function with positional arguments, of any type: pybind11 would take about as long as reading five tensors.
template <auto function, size_t... i>
void define(py::module_& module, const char* name, std::index_sequence<i...>) {
  static const auto run = [](PyObject*, PyObject* const* arguments, Py_ssize_t count) -> PyObject* {
    if (count != sizeof...(i)) {
      PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(i), count);
      return nullptr;
    }
    try {
      return function(arguments[i]...).release().ptr();
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  };
  static PyMethodDef method = {name, nullptr, METH_FASTCALL, nullptr};
  PyObject* (*const pointer)(PyObject*, PyObject* const*, Py_ssize_t) = run;
  method.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(pointer));
  module.attr(name) = checked(PyCFunction_New(&method, nullptr));
}

bool is_true(PyObject* function) { return call(function).ptr() == Py_True; }

bool in_forward_mode() {
  static PyObject* const level = attribute("dph_kernels.torch_private", "forward_mode_level");
  return integer(call(level)) >= 0;
}

// Whether a call on plain tensors has to go through PyTorch's dispatcher, apart from torch.compile and lazily negated
// tensors: dispatch.is_intercepted.
bool intercepted() {
  static PyObject* const mode = attribute("dph_kernels.torch_private", "is_in_torch_dispatch_mode");
  static PyObject* const transforms = attribute("dph_kernels.torch_private", "are_functorch_transforms_active");
  static PyObject* const tracing = attribute("dph_kernels.torch_private", "get_tracing_state");
  return is_true(mode) || is_true(transforms) || in_forward_mode() || !call(tracing).is_none();
}

// Reads a tensor's metadata. Returns false for subclasses other than Parameter, and for tensors without storage (e.g.
// sparse ones, or batched tensors of vmap).
bool peek_any(py::handle tensor, DLTensor& found) {
  static PyObject* const plain = attribute("torch", "Tensor");
  static PyObject* const parameter = attribute("torch.nn", "Parameter");
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  if (type != plain && type != parameter) return false;
  if (exchange().dltensor_from_py_object_no_sync(tensor.ptr(), &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (found.data) found.data = static_cast<char*>(found.data) + found.byte_offset;
  return true;
}

// Like ``peek_any``, but returns false for tensors without an address (e.g. efficient zero tensors), too.
bool peek(py::handle tensor, DLTensor& found) { return peek_any(tensor, found) && found.data; }

// Whether a kernel can read a tensor with this metadata: it is not lazily negated, and its storage, which may have been
// freed, holds all of its elements.
bool is_whole(py::handle tensor, const DLTensor& x) {
  static PyObject* const is_neg = attribute("torch", "Tensor", "is_neg");
  static PyObject* const untyped_storage = attribute("torch", "Tensor", "untyped_storage");
  static PyObject* const storage_offset = attribute("torch", "Tensor", "storage_offset");
  if (call(is_neg, tensor).ptr() != Py_False) return false;
  int64_t last = 0;
  for (int32_t axis = 0; axis < x.ndim; ++axis) {
    if (x.shape[axis] == 0) return true;  // nothing is read
    last += (x.shape[axis] - 1) * x.strides[axis];
  }
  if (!x.data) return false;
  const int64_t stored = PyObject_Size(call(untyped_storage, tensor).ptr());  // bytes
  last += integer(call(storage_offset, tensor));
  return (last + 1) * (x.dtype.bits * x.dtype.lanes / 8) <= stored;
}

// Whether a kernel can read the tensor: ``is_whole``, and of no subclass.
bool readable(py::handle tensor, DLTensor& found) { return peek_any(tensor, found) && is_whole(tensor, found); }

// dispatch.can_bypass_dispatcher, apart from torch.compile; entries that are None are left out.
bool can_bypass_dispatcher(const py::sequence& tensors) {
  DLTensor found;
  for (const py::handle tensor : tensors) {
    if (!tensor.is_none() && !readable(tensor, found)) return false;
  }
  return !intercepted();
}

// Reads a tensor's metadata; data is null if the tensor is None or has no elements.
DLTensor describe(py::handle tensor) {
  DLTensor found{};
  if (tensor.is_none()) return found;
  if (exchange().dltensor_from_py_object_no_sync(tensor.ptr(), &found) != 0) throw py::error_already_set();
  if (found.data) found.data = static_cast<char*>(found.data) + found.byte_offset;
  return found;
}

template <class T = float>
T* data_of(py::handle tensor) {
  return static_cast<T*>(describe(tensor).data);
}

// Whether a call on readable tensors has to be named in a profile, or is computed in another dtype.
bool profiled_or_cast() {
  static PyObject* const autocast = attribute("dph_kernels.torch_private", "any_autocast_enabled");
  static PyObject* const profiled = attribute("dph_kernels.torch_private", "profiler_enabled");
  return is_true(autocast) || is_true(profiled);
}

bool needs_gradients(std::initializer_list<py::handle> tensors) {
  static PyObject* const enabled = attribute("torch", "is_grad_enabled");
  static PyObject* const requires_grad = interned("requires_grad");
  if (!is_true(enabled)) return false;
  for (const py::handle tensor : tensors) {
    if (tensor.is_none()) continue;
    if (checked(PyObject_GetAttr(tensor.ptr(), requires_grad)).ptr() == Py_True) return true;
  }
  return false;
}

// Whether a backward pass needs nothing but its kernel: the upstream gradient is a plain tensor, and no gradients of
// gradients are wanted.
bool is_usual_gradient(py::handle grad) {
  static PyObject* const enabled = attribute("torch", "is_grad_enabled");
  DLTensor found;
  return readable(grad, found) && !is_true(enabled) && !profiled_or_cast() && !intercepted();
}

int torch_threads() {
  static PyObject* const count = attribute("torch", "get_num_threads");
  return static_cast<int>(integer(call(count)));
}

bool is_floating(const DLTensor& x) { return x.dtype.code == kDLFloat || x.dtype.code == kDLBfloat; }

// Whether the CPU's kernels compute in the dtype and on the device.
bool is_kernel_float(const DLTensor& x) {
  const bool fp32 = x.dtype.code == kDLFloat && x.dtype.bits == 32;
  return x.device.device_type == kDLCPU && (fp32 || x.dtype.code == kDLBfloat);
}

bool is_on(const DLTensor& x, const DLDevice& device) {
  return x.device.device_type == device.device_type && x.device.device_id == device.device_id;
}

// Whether both have the same dtype and device.
bool is_like(const DLTensor& x, const DLTensor& like) {
  return x.dtype.code == like.dtype.code && x.dtype.bits == like.dtype.bits && is_on(x, like.device);
}

// Whether both have the same shape, dtype and device.
bool is_alike(const DLTensor& x, const DLTensor& like) {
  return is_like(x, like) && x.ndim == like.ndim && std::equal(x.shape, x.shape + x.ndim, like.shape);
}

// Whether x is a contiguous vector of this size, of the dtype and device of ``like``.
bool is_vector(const DLTensor& x, int64_t size, const DLTensor& like) {
  return is_like(x, like) && x.ndim == 1 && x.shape[0] == size && (size == 1 || x.strides[0] == 1);
}

// Whether x has elements, in rows of contiguous ones.
bool has_rows(const DLTensor& x) { return x.data && x.strides[x.ndim - 1] == 1; }

bool is_text(py::handle value, const char* text) {
  return PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), text) == 0;
}

int64_t size_of(const DLTensor& x) {
  return std::accumulate(x.shape, x.shape + x.ndim, int64_t{1}, std::multiplies<int64_t>());
}

bool is_contiguous(const DLTensor& x) {
  if (std::find(x.shape, x.shape + x.ndim, 0) != x.shape + x.ndim) return true;
  int64_t stride = 1;
  for (int32_t axis = x.ndim - 1; axis >= 0; --axis) {
    if (x.shape[axis] != 1 && x.strides[axis] != stride) return false;
    stride *= x.shape[axis];
  }
  return true;
}

// Contiguous memory of this shape, and of the dtype and device of ``tensor``. PyTorch's functions are looked up in each
// call, as the tests replace them.
py::object new_empty(py::handle tensor, const std::vector<int64_t>& shape) {
  static PyObject* const name = interned("new_empty");
  py::tuple sizes(shape.size());
  for (size_t axis = 0; axis < shape.size(); ++axis) sizes[axis] = shape[axis];
  return checked(PyObject_CallMethodOneArg(tensor.ptr(), name, sizes.ptr()));
}

// fp32 memory of this shape, on the device of ``tensor``.
py::object new_floats(py::handle tensor, const std::vector<int64_t>& shape) {
  static PyObject* const fp32 = attribute("torch", "float32");
  if (describe(tensor).dtype.code == kDLFloat) return new_empty(tensor, shape);  // faster, and fp16 has no kernel
  return tensor.attr("new_empty")(py::cast(shape), py::arg("dtype") = py::handle(fp32));
}

// Contiguous memory of the shape, dtype and device of ``tensor``, whose metadata is x.
py::object empty_like(py::handle tensor, const DLTensor& x) {
  static PyObject *const torch = py::module_::import("torch").release().ptr(), *const name = interned("empty_like");
  if (!is_contiguous(x)) return new_empty(tensor, {x.shape, x.shape + x.ndim});
  return checked(PyObject_CallMethodOneArg(torch, name, tensor.ptr()));
}

// A tensor and its metadata; data is null if it is None or has no elements.
struct Described {
  py::object tensor;
  DLTensor x;

  explicit Described(py::object value) : tensor(std::move(value)), x(describe(tensor)) {}
};

// The tensor, copied unless the elements of its last dimension are contiguous (checks.last_contiguous); or None.
Described last_contiguous(py::handle tensor) {
  Described found(py::reinterpret_borrow<py::object>(tensor));
  if (found.x.ndim == 0 || found.x.strides[found.x.ndim - 1] == 1) return found;
  return Described(tensor.attr("contiguous")());
}

Described empty_like(const Described& like) { return Described(empty_like(like.tensor, like.x)); }

// Like ``peek``, but throws if the tensor is a subclass or has no storage.
DLTensor look(py::handle tensor) {
  DLTensor found;
  if (!peek(tensor, found)) throw std::invalid_argument("expected a Tensor or Parameter with storage, got another");
  return found;
}

}  // namespace
