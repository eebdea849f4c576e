// Python bindings; no other file depends on Python. Tensors, checked by the callers in dph_kernels, are passed as
// integer pointers, or as tensors if reading their metadata in Python would take longer than the kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "attention.h"
#include "cpu/instruction_sets.h"
#include "cpu/pages.h"
#include "dlpack.h"
#include "laprop.h"
#include "linear.h"
#include "linear_logprob.h"
#include "preference_loss.h"
#include "residual_norm.h"
#include "swiglu.h"
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
                                      double bias_correction, double momentum_scale, intptr_t clock, intptr_t rate,
                                      intptr_t coefficients) {
  return {reinterpret_cast<const dph::LapropTensor*>(table),
          count,
          chunks,
          {lr, beta1, beta2, eps, weight_decay, prior_decay, bias_correction, momentum_scale},
          reinterpret_cast<const float*>(grad_scale),
          reinterpret_cast<dph::LapropClock*>(clock),
          reinterpret_cast<const double*>(rate),
          reinterpret_cast<dph::LapropCoefficients*>(coefficients)};
}

dph::GradientNormArguments gradient_norm_arguments(intptr_t table, int64_t count, int64_t chunks, double max_norm,
                                                   intptr_t partials, intptr_t norm, intptr_t scale, intptr_t finite) {
  return {reinterpret_cast<const dph::GradientTensor*>(table),
          count,
          chunks,
          max_norm,
          reinterpret_cast<double*>(partials),
          reinterpret_cast<double*>(norm),
          reinterpret_cast<float*>(scale),
          reinterpret_cast<bool*>(finite)};
}

void bind_laprop(py::module_& module) {
  using namespace dph;
  using namespace py::literals;
  module.attr("LAPROP_CHUNK") = LAPROP_CHUNK;
  module.attr("LAPROP_COEFFICIENTS") = sizeof(LapropCoefficients) / sizeof(float);
  py::class_<LapropArguments>(module, "LapropArguments")
      .def(py::init(&laprop_arguments), py::kw_only(), "table"_a, "count"_a, "chunks"_a, "grad_scale"_a, "lr"_a,
           "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "prior_decay"_a, "bias_correction"_a, "momentum_scale"_a,
           "clock"_a = 0, "rate"_a = 0, "coefficients"_a = 0);
  py::class_<GradientNormArguments>(module, "GradientNormArguments")
      .def(py::init(&gradient_norm_arguments), py::kw_only(), "table"_a, "count"_a, "chunks"_a, "max_norm"_a,
           "partials"_a, "norm"_a, "scale"_a, "finite"_a);
  const py::call_guard<py::gil_scoped_release> released;
  module.def("laprop_cpu", &laprop_cpu, "arguments"_a, "threads"_a, released);
  module.def("gradient_norm_cpu", &gradient_norm_cpu, "arguments"_a, "threads"_a, released);
#ifdef DPH_CUDA
  module.def(
      "laprop_cuda",
      [](const LapropArguments& arguments, intptr_t stream) {
        check_cuda(laprop_cuda(arguments, reinterpret_cast<void*>(stream)));
      },
      "arguments"_a, "stream"_a, released);
  module.def(
      "gradient_norm_cuda",
      [](const GradientNormArguments& arguments, intptr_t stream) {
        check_cuda(gradient_norm_cuda(arguments, reinterpret_cast<void*>(stream)));
      },
      "arguments"_a, "stream"_a, released);
  module.def(
      "cuda_write",
      [](intptr_t words, int64_t count, intptr_t target, intptr_t stream) {
        check_cuda(cuda_write(reinterpret_cast<const int64_t*>(words), count, reinterpret_cast<int64_t*>(target),
                              reinterpret_cast<void*>(stream)));
      },
      "words"_a, "count"_a, "target"_a, "stream"_a, released);
#endif
}

dph::AttentionRows attention_rows(intptr_t data, int64_t row, int64_t head) {
  return {reinterpret_cast<void*>(data), row, head};
}

// Sets each field by name; an unknown field raises AttributeError.
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
      .def_readwrite("key_heads", &AttentionArguments::key_heads)
      .def_readwrite("parts", &AttentionArguments::parts)
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

void bind_linear_logprob(py::module_& module) {
  using namespace dph;
  using namespace py::literals;
  py::class_<LogprobTile>(module, "LogprobTile")
      .def(py::init(&from_fields<LogprobTile>))
      .def_readwrite("rows", &LogprobTile::rows)
      .def_readwrite("columns", &LogprobTile::columns)
      .def_readwrite("stride", &LogprobTile::stride)
      .def_readwrite("first", &LogprobTile::first)
      .def_readwrite("last", &LogprobTile::last)
      .def_property("logits", nullptr, address(&LogprobTile::logits))
      .def_property("targets", nullptr, address(&LogprobTile::targets))
      .def_property("largest", nullptr, address(&LogprobTile::largest))
      .def_property("log_sum", nullptr, address(&LogprobTile::log_sum))
      .def_property("logprobs", nullptr, address(&LogprobTile::logprobs))
      .def_property("entropy", nullptr, address(&LogprobTile::entropy))
      .def_property("best", nullptr, address(&LogprobTile::best))
      .def_property("upstream", nullptr, address(&LogprobTile::upstream))
      .def_property("factors", nullptr, address(&LogprobTile::factors));
  const py::call_guard<py::gil_scoped_release> released;
  module.def("linear_logprob_reduce_cpu", &linear_logprob_reduce_cpu, "tile"_a, "threads"_a, released);
  module.def("linear_logprob_gradient_cpu", &linear_logprob_gradient_cpu, "tile"_a, "threads"_a, released);
  module.def("linear_logprob_keep_cpu", &linear_logprob_keep_cpu, "tile"_a, "threads"_a, released);
}

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

// Reads a tensor's metadata. Returns false for subclasses other than Parameter, and for tensors without storage (e.g.
// batched tensors of vmap, or efficient zero tensors).
bool peek(py::handle tensor, DLTensor& found) {
  static PyObject *plain = nullptr, *parameter = nullptr;  // classes, alive until the interpreter exits
  if (!parameter) {
    const py::module_ torch = py::module_::import("torch");
    plain = torch.attr("Tensor").ptr();
    parameter = torch.attr("nn").attr("Parameter").ptr();
  }
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  if (type != plain && type != parameter) return false;
  if (exchange().dltensor_from_py_object_no_sync(tensor.ptr(), &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (!found.data) return false;
  found.data = static_cast<char*>(found.data) + found.byte_offset;
  return true;
}

// Like ``peek``, but throws if the tensor is a subclass or has no storage.
DLTensor look(py::handle tensor) {
  DLTensor found;
  if (!peek(tensor, found)) throw std::invalid_argument("expected a Tensor or Parameter with storage, got another");
  return found;
}

// Whether x is a contiguous fp32 vector of ``count`` elements.
bool dense(const DLTensor& x, int64_t count) {
  return x.dtype.code == kDLFloat && x.dtype.bits == 32 && x.ndim == 1 && x.shape[0] == count &&
         (count < 2 || x.strides[0] == 1);
}

float* floats(py::handle tensor) { return static_cast<float*>(look(tensor).data); }

// Whether each part of the objective has all or none of its inputs, and at least one part is present.
bool complete(size_t rewards, size_t logprobs) {
  return (rewards == 0 || rewards == 2) && (logprobs == 0 || logprobs == 4) && rewards + logprobs > 0;
}

// Whether the inputs are non-empty floating-point tensors on one device, the rewards all [N] or all [N, K], the
// log-probabilities [N].
bool preference_loss_fits(const py::tuple& rewards, const py::tuple& logprobs) {
  if (!complete(rewards.size(), logprobs.size())) return false;
  DLTensor first{};
  bool any = false;
  for (const py::tuple* const part : {&rewards, &logprobs}) {
    const int32_t axes = part == &rewards ? 2 : 1;
    for (const py::handle tensor : *part) {
      DLTensor x;
      if (!peek(tensor, x)) return false;
      if (!any) {
        if (x.ndim < 1 || x.ndim > axes) return false;
        first = x;
        any = true;
      }
      const bool like_first = x.ndim == (part == &rewards ? first.ndim : 1) && x.shape[0] == first.shape[0] &&
                              (x.ndim < 2 || x.shape[1] == first.shape[1]);
      const bool there = x.device.device_type == first.device.device_type && x.device.device_id == first.device.device_id;
      if (!like_first || !there) return false;
      if (x.dtype.code != kDLFloat && x.dtype.code != kDLBfloat) return false;
    }
  }
  return first.shape[0] > 0 && (first.ndim < 2 || first.shape[1] > 0);
}

// Returns false if an input is neither fp32 nor bf16. ``options`` is in the order of reference.Options. Arguments are
// positional, because keyword arguments would take longer than the arithmetic.
bool preference_loss(const py::tuple& inputs, size_t rewards, const py::tuple& options, py::handle loss,
                     py::handle metrics, py::handle slopes, int threads) {
  const size_t logprobs = inputs.size() - rewards;
  if (!complete(rewards, logprobs))
    throw std::invalid_argument("expected 2 rewards, 4 log-probabilities, or both");
  dph::PreferenceInput found[6];
  dph::PreferenceArguments a{};
  for (size_t i = 0; i < inputs.size(); ++i) {
    const DLTensor x = look(inputs[i]);
    if (i == 0) {
      a.pairs = x.shape[0];
      a.heads = x.ndim == 2 ? x.shape[1] : 1;
    }
    const bool bf16 = x.dtype.code == kDLBfloat;
    if (!bf16 && !(x.dtype.code == kDLFloat && x.dtype.bits == 32)) return false;
    found[i] = {x.data, x.strides[0], x.strides[x.ndim - 1], bf16};
  }
  a.rewards = rewards > 0 ? found : nullptr;
  a.logprobs = logprobs > 0 ? found + rewards : nullptr;
  a.beta = options[0].cast<float>();
  a.dpo_epsilon = options[1].cast<float>();
  a.dph_epsilon = options[2].cast<float>();
  a.dpo_weight = options[3].cast<float>();
  a.dph_weight = options[4].cast<float>();
  a.contrastive = options[5].cast<std::string_view>() == "contrastive";
  a.loss = floats(loss);
  a.metrics = floats(metrics);
  a.slopes = floats(slopes);
  const py::gil_scoped_release released;
  dph::preference_loss_cpu(a, threads);
  return true;
}

// Returns false if ``slopes`` is not as saved by the forward pass, or ``grad`` is not the fp32 scalar that autograd
// passes; hooks can change both.
bool preference_loss_gradients(py::handle slopes, py::handle grad, const py::list& results, int threads) {
  if (results.size() > 4) throw std::invalid_argument("expected at most 4 gradients");
  dph::PreferenceGradient found[4];
  const int64_t count = results.size();
  int64_t values = 0;
  for (int64_t i = 0; i < count; ++i) {
    DLTensor x;
    if (!peek(results[i], x)) return false;
    found[i] = {static_cast<float*>(x.data), 1};
    for (int32_t axis = 0; axis < x.ndim; ++axis) found[i].size *= x.shape[axis];
    values += found[i].size;
  }
  DLTensor all, scale;
  if (!peek(slopes, all) || !dense(all, values) || !peek(grad, scale)) return false;
  if (scale.ndim != 0 || scale.dtype.code != kDLFloat || scale.dtype.bits != 32) return false;
  const py::gil_scoped_release released;
  dph::preference_loss_gradients_cpu(static_cast<const float*>(all.data), *static_cast<const float*>(scale.data), found,
                                     count, threads);
  return true;
}

void bind_preference_loss(py::module_& module) {
  module.def("preference_loss_fits", &preference_loss_fits);
  module.def("preference_loss_cpu", &preference_loss);
  module.def("preference_loss_gradients_cpu", &preference_loss_gradients);
}

// Reads a tensor's metadata; data is null if the tensor is None or has no elements.
DLTensor describe(py::handle tensor) {
  DLTensor found{};
  if (tensor.is_none()) return found;
  if (exchange().dltensor_from_py_object_no_sync(tensor.ptr(), &found) != 0) throw py::error_already_set();
  if (found.data) found.data = static_cast<char*>(found.data) + found.byte_offset;
  return found;
}

dph::NormRows norm_rows(py::handle tensor) {
  const DLTensor x = describe(tensor);
  if (!x.data) return {};
  return {x.data, x.strides[0], x.ndim == 3 ? x.strides[1] : 0};
}

// ``moments``: mean and rstd [2, T] or [2, T, H], of RMSNorm rstd alone.
dph::ResidualNorm residual_norm(py::handle total, py::handle weight, py::handle moments) {
  const DLTensor scale = describe(weight), found = describe(moments);
  dph::ResidualNorm a;
  a.heads = found.ndim == 3 ? found.shape[2] : 1;
  a.rows = found.shape[1] * a.heads;
  a.columns = scale.shape[0];
  a.bf16 = scale.dtype.code == kDLBfloat;
  a.rms = found.shape[0] == 1;
  a.total = norm_rows(total);
  a.weight = scale.data;
  a.rstd = static_cast<float*>(found.data);
  if (!a.rms) {
    a.mean = a.rstd;
    a.rstd += a.rows;
  }
  return a;
}

// The caller has checked the tensors and their layouts. Arguments are positional, because keyword arguments would take
// longer than a few rows.
void residual_norm_forward(py::handle x, py::handle update, py::handle weight, py::handle bias, float eps,
                           py::handle total, py::handle normed, py::handle moments, int threads) {
  dph::ResidualNorm a = residual_norm(update.is_none() ? x : total, weight, moments);
  a.eps = eps;
  a.x = norm_rows(x);
  a.update = norm_rows(update);
  a.bias = describe(bias).data;
  a.normed = norm_rows(normed);
  const py::gil_scoped_release released;
  dph::residual_norm_forward_cpu(a, threads);
}

// Gradients that are not requested are passed as empty tensors.
void residual_norm_backward(py::handle d_total, py::handle d_normed, py::handle total, py::handle weight,
                            py::handle moments, py::handle d_x, py::handle d_weight, py::handle d_bias, int threads) {
  dph::ResidualNorm a = residual_norm(total, weight, moments);
  a.d_total = norm_rows(d_total);
  a.d_normed = norm_rows(d_normed);
  a.d_x = norm_rows(d_x);
  a.d_weight = describe(d_weight).data;
  a.d_bias = describe(d_bias).data;
  const py::gil_scoped_release released;
  dph::residual_norm_backward_cpu(a, threads);
}

void bind_residual_norm(py::module_& module) {
  module.def("residual_norm_forward_cpu", &residual_norm_forward);
  module.def("residual_norm_backward_cpu", &residual_norm_backward);
  module.def("residual_norm_lanes", &dph::residual_norm_lanes);
}

void bind_linear(py::module_& module) {
  using namespace dph;
  using namespace py::literals;
  py::class_<LinearArguments>(module, "LinearArguments")
      .def(py::init(&from_fields<LinearArguments>))
      .def_readwrite("rows", &LinearArguments::rows)
      .def_readwrite("columns", &LinearArguments::columns)
      .def_readwrite("depth", &LinearArguments::depth)
      .def_property("x", nullptr, address(&LinearArguments::x))
      .def_readwrite("x_row", &LinearArguments::x_row)
      .def_property("weight", nullptr, address(&LinearArguments::weight))
      .def_readwrite("weight_row", &LinearArguments::weight_row)
      .def_readwrite("bf16", &LinearArguments::bf16)
      .def_property("bias", nullptr, address(&LinearArguments::bias))
      .def_property("out", nullptr, address(&LinearArguments::out))
      .def_readwrite("out_row", &LinearArguments::out_row);
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def("linear_lanes", &linear_lanes, "most"_a);
  module.def("linear_forward_cpu", &linear_forward_cpu, "arguments"_a, "threads"_a, released);
}

void bind_swiglu(py::module_& module) {
  using namespace dph;
  using namespace py::literals;
  module.attr("SWIGLU_CHUNK") = SWIGLU_CHUNK;
  py::class_<SwigluArguments>(module, "SwigluArguments")
      .def(py::init(&from_fields<SwigluArguments>))
      .def_readwrite("rows", &SwigluArguments::rows)
      .def_readwrite("columns", &SwigluArguments::columns)
      .def_readwrite("bf16", &SwigluArguments::bf16)
      .def_property("projected", nullptr, address(&SwigluArguments::projected))
      .def_readwrite("projected_row", &SwigluArguments::projected_row)
      .def_property("bias", nullptr, address(&SwigluArguments::bias))
      .def_property("out", nullptr, address(&SwigluArguments::out))
      .def_property("grad", nullptr, address(&SwigluArguments::grad))
      .def_readwrite("grad_row", &SwigluArguments::grad_row)
      .def_property("d_projected", nullptr, address(&SwigluArguments::d_projected))
      .def_property("sums", nullptr, address(&SwigluArguments::sums));
  const py::call_guard<py::gil_scoped_release> released;
  module.def("swiglu_forward_cpu", &swiglu_forward_cpu, "arguments"_a, "threads"_a, released);
  module.def("swiglu_backward_cpu", &swiglu_backward_cpu, "arguments"_a, "threads"_a, released);
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

#define DPH_QUOTED(value) #value
#define DPH_TEXT(macro) DPH_QUOTED(macro)

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ and CUDA kernels of dph_kernels";
  module.attr("source") = DPH_SOURCE;  // digest of csrc at build time
#if defined(__clang__)
  module.attr("compiler") = "clang++ " __clang_version__;
#else
  module.attr("compiler") = "g++ " __VERSION__;
#endif
#if defined(_OPENMP)
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.def("prefer_huge_pages", [](intptr_t data, int64_t bytes) {
    dph::prefer_huge_pages(reinterpret_cast<void*>(data), bytes);
  });
  module.attr("vector_floats") = dph::vector_floats();
#if defined(__x86_64__) && defined(__GNUC__)
  module.attr("intel") = __builtin_cpu_is("intel") != 0;  // CPU vendor
#else
  module.attr("intel") = false;
#endif
#ifdef DPH_CUDA
  module.attr("cuda") = dph::cuda_runtime_version();
  module.def("cuda_probe", &dph::cuda_probe);
  module.def("cuda_error_text", &dph::cuda_error_text);
#else
  module.attr("cuda") = 0;
#endif
  bind_attention(module);
  bind_laprop(module);
  bind_linear_logprob(module);
  bind_preference_loss(module);
  bind_residual_norm(module);
  bind_linear(module);
  bind_swiglu(module);
  bind_swiglu_reward(module);
}
