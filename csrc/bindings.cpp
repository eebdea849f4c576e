// The only file that knows Python. Pointers arrive as integers; the callers in dph_kernels have checked the tensors.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "laprop.h"
#ifdef DPH_CUDA
#include "cuda/runtime.h"
#endif

namespace py = pybind11;

namespace {

#ifdef DPH_CUDA
void check_cuda(int code) {
  if (code != 0) throw std::runtime_error("CUDA error " + std::to_string(code) + ": " + dph::cuda_error_text(code));
}
#endif

dph::LapropArguments laprop_arguments(intptr_t table, int64_t count, int64_t chunks, intptr_t grad_scale, double lr,
                                      double beta1, double beta2, double eps, double weight_decay, double prior_decay,
                                      double bias_correction, double momentum_scale) {
  dph::LapropArguments arguments;
  arguments.tensors = reinterpret_cast<const dph::LapropTensor*>(table);
  arguments.count = count;
  arguments.chunks = chunks;
  arguments.grad_scale = reinterpret_cast<const float*>(grad_scale);
  // Products are taken in double: 1 - beta and lr * decay lose digits in float.
  auto& k = arguments.coefficients;
  k.beta1 = static_cast<float>(beta1);
  k.beta2 = static_cast<float>(beta2);
  k.square = static_cast<float>(1.0 - beta2);
  k.step = static_cast<float>((1.0 - beta1) * lr * bias_correction);
  k.eps = static_cast<float>(eps);
  k.prior_decay = static_cast<float>(prior_decay * lr);
  k.weight_decay = static_cast<float>(weight_decay * lr);
  k.momentum_scale = static_cast<float>(momentum_scale);
  return arguments;
}

void bind_laprop(py::module_& module) {
  using namespace py::literals;
  module.attr("LAPROP_CHUNK") = dph::LAPROP_CHUNK;
  py::class_<dph::LapropArguments>(module, "LapropArguments")
      .def(py::init(&laprop_arguments), py::kw_only(), "table"_a, "count"_a, "chunks"_a, "grad_scale"_a, "lr"_a,
           "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "prior_decay"_a, "bias_correction"_a, "momentum_scale"_a);
  module.def("laprop_cpu", &dph::laprop_cpu, "arguments"_a, "threads"_a, py::call_guard<py::gil_scoped_release>());
#ifdef DPH_CUDA
  module.def(
      "laprop_cuda",
      [](const dph::LapropArguments& arguments, intptr_t stream) {
        check_cuda(dph::laprop_cuda(arguments, reinterpret_cast<void*>(stream)));
      },
      "arguments"_a, "stream"_a, py::call_guard<py::gil_scoped_release>());
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ and CUDA kernels of dph_kernels";
  module.attr("source") = DPH_SOURCE;  // digest of csrc when this was built
  module.attr("compiler") = __VERSION__;
#ifdef DPH_CUDA
  module.attr("cuda") = dph::cuda_runtime_version();
  module.def("cuda_probe", &dph::cuda_probe);
  module.def("cuda_error_text", &dph::cuda_error_text);
#else
  module.attr("cuda") = 0;
#endif
  bind_laprop(module);
}
