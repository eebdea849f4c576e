// The only file that knows Python. Pointers arrive as integers; the callers in dph_kernels have checked the tensors.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "attention.h"
#include "laprop.h"
#include "swiglu_reward.h"
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

dph::AttentionRows attention_rows(intptr_t data, int64_t row, int64_t head) {
  return {reinterpret_cast<void*>(data), row, head};
}

// Every field by its name: a field that a caller misspells is an error there.
template <class T>
T from_fields(const py::kwargs& fields) {
  T result;
  py::object holder = py::cast(&result, py::return_value_policy::reference);
  for (const auto& [name, value] : fields) holder.attr(name) = value;
  return result;
}

template <class T, class Pointer>
auto address(Pointer T::* field) {
  return [field](T& self, intptr_t value) { self.*field = reinterpret_cast<Pointer>(value); };
}

void bind_attention(py::module_& module) {
  using namespace dph;
  using namespace py::literals;
  module.attr("ATTENTION_ROWS") = ATTENTION_ROWS;
  module.attr("ATTENTION_BLOCK") = ATTENTION_BLOCK;
  py::class_<AttentionRows>(module, "AttentionRows").def(py::init(&attention_rows), "data"_a, "row"_a, "head"_a);
  py::class_<AttentionArguments> attention(module, "AttentionArguments");
  attention.def(py::init(&from_fields<AttentionArguments>))
      .def("schedule",
           [](AttentionArguments& self, intptr_t tiles, intptr_t runs, intptr_t bounds, int64_t count, intptr_t tasks,
              int64_t task_count) {
             self.work = {reinterpret_cast<const int32_t*>(tiles), reinterpret_cast<const int32_t*>(runs),
                          reinterpret_cast<const int32_t*>(bounds), reinterpret_cast<const int32_t*>(tasks), count,
                          task_count};
           },
           py::kw_only(), "tiles"_a, "runs"_a, "bounds"_a, "count"_a, "tasks"_a = 0, "task_count"_a = 0)
      .def_readwrite("heads", &AttentionArguments::heads)
      .def_readwrite("head_dim", &AttentionArguments::head_dim)
      .def_readwrite("memory", &AttentionArguments::memory)
      .def_readwrite("scale", &AttentionArguments::scale)
      .def_readwrite("bf16", &AttentionArguments::bf16)
      .def_readwrite("q", &AttentionArguments::q)
      .def_readwrite("k", &AttentionArguments::k)
      .def_readwrite("v", &AttentionArguments::v)
      .def_readwrite("memory_k", &AttentionArguments::memory_k)
      .def_readwrite("memory_v", &AttentionArguments::memory_v)
      .def_readwrite("out", &AttentionArguments::out)
      .def_readwrite("grad", &AttentionArguments::grad)
      .def_readwrite("dq", &AttentionArguments::dq)
      .def_readwrite("dk", &AttentionArguments::dk)
      .def_readwrite("dv", &AttentionArguments::dv)
      .def_property("q_cos", nullptr, address(&AttentionArguments::q_cos))
      .def_property("q_sin", nullptr, address(&AttentionArguments::q_sin))
      .def_property("lse", nullptr, address(&AttentionArguments::lse));
  py::class_<RotateArguments>(module, "RotateArguments")
      .def(py::init(&from_fields<RotateArguments>))
      .def_readwrite("source", &RotateArguments::in)
      .def_readwrite("target", &RotateArguments::out)
      .def_readwrite("rows", &RotateArguments::rows)
      .def_readwrite("heads", &RotateArguments::heads)
      .def_readwrite("head_dim", &RotateArguments::head_dim)
      .def_readwrite("sign", &RotateArguments::sign)
      .def_readwrite("source_bf16", &RotateArguments::in_bf16)
      .def_readwrite("target_bf16", &RotateArguments::out_bf16)
      .def_property("cos", nullptr, address(&RotateArguments::cos))
      .def_property("sin", nullptr, address(&RotateArguments::sin));
  const py::call_guard<py::gil_scoped_release> released;
  module.def("attention_lanes", &attention_lanes, "most"_a);
  module.def("attention_forward_cpu", &attention_forward_cpu, "arguments"_a, "threads"_a, released);
  module.def("attention_backward_cpu", &attention_backward_cpu, "arguments"_a, "threads"_a, released);
  module.def("rotate_cpu", &rotate_cpu, "arguments"_a, "threads"_a, released);
}

void bind_swiglu_reward(py::module_& module) {
  using namespace dph;
  using namespace py::literals;
  using Arguments = SwigluRewardArguments;
  module.attr("REWARD_LANES") = REWARD_LANES;
  py::class_<RewardMatrix>(module, "RewardMatrix")
      .def(py::init([](intptr_t data, int64_t row, int64_t column) {
             return RewardMatrix{reinterpret_cast<void*>(data), row, column};
           }),
           "data"_a = 0, "row"_a = 0, "column"_a = 0);
  py::class_<RewardDropout>(module, "RewardDropout")
      .def(py::init<uint32_t, uint32_t, float>(), "threshold"_a, "stream"_a, "keep"_a);
  py::class_<Arguments>(module, "SwigluRewardArguments")
      .def(py::init(&from_fields<Arguments>))
      .def_readwrite("rows", &Arguments::rows)
      .def_readwrite("columns", &Arguments::columns)
      .def_readwrite("width", &Arguments::width)
      .def_readwrite("heads", &Arguments::heads)
      .def_readwrite("bf16", &Arguments::bf16)
      .def_readwrite("hidden", &Arguments::hidden)
      .def_readwrite("reward", &Arguments::reward)
      .def_readwrite("w1", &Arguments::w1)
      .def_readwrite("b1", &Arguments::b1)
      .def_readwrite("w2", &Arguments::w2)
      .def_readwrite("b2", &Arguments::b2)
      .def_property("row_ids", nullptr, address(&Arguments::row_ids))
      .def_readwrite("seed", &Arguments::seed)
      .def_readwrite("input", &Arguments::input)
      .def_readwrite("pooled", &Arguments::pooled)
      .def_property("rewards", nullptr, address(&Arguments::rewards))
      .def_property("kept_projected", nullptr, address(&Arguments::kept_projected))
      .def_property("kept_pooled", nullptr, address(&Arguments::kept_pooled))
      .def_property("grad", nullptr, address(&Arguments::grad))
      .def_readwrite("grad_row", &Arguments::grad_row)
      .def_readwrite("grad_column", &Arguments::grad_column)
      .def_property("d_hidden", nullptr, address(&Arguments::d_hidden))
      .def_property("d_reward", nullptr, address(&Arguments::d_reward))
      .def_property("d_w1", nullptr, address(&Arguments::d_w1))
      .def_property("d_b1", nullptr, address(&Arguments::d_b1))
      .def_property("d_w2", nullptr, address(&Arguments::d_w2))
      .def_property("d_b2", nullptr, address(&Arguments::d_b2));
  const py::call_guard<py::gil_scoped_release> released;
  module.def("swiglu_reward_lanes", &swiglu_reward_lanes, "most"_a);
  module.def("swiglu_reward_forward_cpu", &swiglu_reward_forward_cpu, "arguments"_a, "threads"_a, released);
  module.def("swiglu_reward_backward_cpu", &swiglu_reward_backward_cpu, "arguments"_a, "threads"_a, released);
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
  bind_attention(module);
  bind_laprop(module);
  bind_swiglu_reward(module);
}
