// Subset of DLPack's C interface, version 1 (https://dmlc.github.io/dlpack), to read tensor metadata from PyTorch
// without calling into Python. Names and layouts follow the standard, except that the fields of the header of
// DLPackExchangeAPI are declared inline.
#pragma once

#include <cstdint>

extern "C" {

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

constexpr int32_t kDLCPU = 1;                   // type of DLDevice
constexpr uint8_t kDLInt = 0, kDLFloat = 2, kDLBfloat = 4;  // codes of DLDataType

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// Function table of a tensor type, stored in the capsule in its attribute __dlpack_c_exchange_api__.
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* tensor, DLTensor* found);  // borrowed: the tensor keeps ownership
  void* current_work_stream;
};

}  // extern "C"
