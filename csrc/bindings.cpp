// Python bindings; no other file but tensors.h depends on Python. Tensors, checked by the callers in dph_kernels, are
// passed as integer pointers, or as tensors if reading their metadata in Python would take longer than the kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.h"
#include "cpu/instruction_sets.h"
#include "cpu/pages.h"
#include "laprop.h"
#include "linear.h"
#include "linear_logprob.h"
#include "preference_loss.h"
#include "residual_norm.h"
#include "swiglu.h"
#include "swiglu_reward.h"
#include "tensors.h"
#ifdef DPH_CUDA
#include "cuda/runtime.h"
#endif

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

// A tile of logits, from ``row`` and ``column`` on, of rows with ``targets`` [R] and ``normaliser`` [2, R].
dph::LogprobTile logprob_tile(py::handle logits, int64_t row, int64_t column, py::handle targets,
                              py::handle normaliser) {
  const DLTensor x = describe(logits), moments = describe(normaliser);
  dph::LogprobTile tile;
  tile.logits = static_cast<float*>(x.data);
  tile.rows = x.shape[0];
  tile.columns = x.shape[1];
  tile.stride = x.strides[0];
  tile.first = column;
  tile.targets = data_of<int64_t>(targets) + row;
  tile.largest = static_cast<float*>(moments.data) + row;
  tile.log_sum = tile.largest + moments.strides[0];
  return tile;
}

// ``entropy`` and ``best`` are empty without statistics.
void set_results(dph::LogprobTile& tile, int64_t row, py::handle logprobs, py::handle entropy, py::handle best) {
  tile.logprobs = data_of(logprobs) + row;
  tile.entropy = data_of(entropy);
  tile.best = data_of<int64_t>(best);
  if (!tile.entropy) return;
  tile.entropy += row;
  tile.best += row;
}

// The caller has checked the tensors. Arguments are positional, because keyword arguments would take longer than a few
// rows.
void linear_logprob_reduce(py::handle logits, int64_t row, int64_t column, py::handle targets, py::handle normaliser,
                           py::handle logprobs, py::handle entropy, py::handle best, bool last) {
  dph::LogprobTile tile = logprob_tile(logits, row, column, targets, normaliser);
  set_results(tile, row, logprobs, entropy, best);
  tile.last = last;
  const int threads = torch_threads();
  const py::gil_scoped_release released;
  dph::linear_logprob_reduce_cpu(tile, threads);
}

void linear_logprob_gradient(py::handle logits, int64_t row, int64_t column, py::handle targets, py::handle normaliser,
                             py::handle grad) {
  dph::LogprobTile tile = logprob_tile(logits, row, column, targets, normaliser);
  tile.upstream = data_of(grad) + row;
  const int threads = torch_threads();
  const py::gil_scoped_release released;
  dph::linear_logprob_gradient_cpu(tile, threads);
}

void linear_logprob_keep(py::handle logits, int64_t row, py::handle targets, py::handle normaliser, py::handle logprobs,
                         py::handle entropy, py::handle best, py::handle factors) {
  dph::LogprobTile tile = logprob_tile(logits, row, 0, targets, normaliser);
  set_results(tile, row, logprobs, entropy, best);
  tile.last = true;
  tile.factors = data_of(factors);
  const int threads = torch_threads();
  const py::gil_scoped_release released;
  dph::linear_logprob_keep_cpu(tile, threads);
}

// Whether a call of the operator is usual, see dispatch.usual_call.
bool linear_logprob_fits(py::handle hidden, py::handle weight, py::handle targets) {
  DLTensor rows, matrix, chosen;
  if (!readable(hidden, rows) || !is_kernel_float(rows) || rows.ndim != 2 || !rows.data) return false;
  if (!readable(weight, matrix) || !is_like(matrix, rows) || matrix.ndim != 2 || !matrix.data) return false;
  if (!readable(targets, chosen) || chosen.dtype.code != kDLInt || chosen.dtype.bits != 64) return false;
  if (!is_on(chosen, rows.device) || chosen.ndim != 1 || !is_contiguous(chosen)) return false;
  if (matrix.shape[1] != rows.shape[1] || chosen.shape[0] != rows.shape[0]) return false;
  const auto* ids = static_cast<const int64_t*>(chosen.data);
  const auto is_token = [&](int64_t id) { return id >= 0 && id < matrix.shape[0]; };
  if (!std::all_of(ids, ids + chosen.shape[0], is_token)) return false;
  return !intercepted() && !profiled_or_cast();
}

void bind_linear_logprob(py::module_& module) {
  module.def("linear_logprob_fits", &linear_logprob_fits);
  module.def("linear_logprob_reduce_cpu", &linear_logprob_reduce);
  module.def("linear_logprob_gradient_cpu", &linear_logprob_gradient);
  module.def("linear_logprob_keep_cpu", &linear_logprob_keep);
}

// Whether the optimizer's lists hold contiguous tensors on one device, of the shapes of the parameters and of dtypes
// that it supports (_check_tensors of dph_kernels/laprop). Lists that are absent are empty.
bool laprop_fits(const py::sequence& params, const py::sequence& grads, const py::sequence& exp_avg,
                 const py::sequence& exp_avg_sq, const py::sequence& priors, const py::sequence& copies) {
  const auto is_half = [](const DLTensor& x, bool fp16) {
    return x.dtype.code == kDLBfloat || (fp16 && x.dtype.code == kDLFloat && x.dtype.bits == 16);
  };
  DLTensor first, param, x;
  if (!peek_any(params[0], first) || first.dtype.code != kDLFloat || first.dtype.bits < 32) return false;
  for (size_t i = 0; i < params.size(); ++i) {
    if (!peek_any(params[i], param) || !is_like(param, first) || !is_contiguous(param)) return false;
    for (const auto& [list, halves, full] :
         {std::tuple{&grads, 2, true}, {&exp_avg, 0, true}, {&exp_avg_sq, 0, true}, {&priors, 1, true},
          {&copies, 2, false}}) {
      if (list->size() == 0) continue;
      if (!peek_any((*list)[i], x) || !is_on(x, first.device) || !is_contiguous(x)) return false;
      const bool fp32 = list == &grads && x.dtype.code == kDLFloat && x.dtype.bits == 32;
      if (!(full && is_like(x, first)) && !fp32 && !(halves && is_half(x, halves == 2))) return false;
      if (x.ndim != param.ndim || !std::equal(x.shape, x.shape + x.ndim, param.shape)) return false;
    }
  }
  return true;
}

int64_t chunks_of(int64_t size) { return (size + dph::LAPROP_CHUNK - 1) / dph::LAPROP_CHUNK; }

// One step on tensors of the CPU, in place, with the settings of LapropSettings in their order. The caller has checked
// the tensors; lists that are absent are empty.
void laprop_tensors(const py::sequence& params, const py::sequence& grads, const py::sequence& exp_avg,
                    const py::sequence& exp_avg_sq, const py::sequence& priors, const py::sequence& copies,
                    py::handle grad_scale, py::handle clock, py::handle rate, const std::array<double, 8>& settings) {
  std::vector<dph::LapropTensor> table(params.size());
  dph::LapropArguments a{};
  for (size_t i = 0; i < table.size(); ++i) {
    const DLTensor grad = describe(grads[i]);
    dph::LapropTensor& row = table[i];
    row = {data_of(params[i]), data_of(exp_avg[i]), data_of(exp_avg_sq[i]), grad.data,
           nullptr,            nullptr,             size_of(grad),          a.chunks,
           0};
    if (grad.dtype.code == kDLBfloat) row.kinds |= dph::LAPROP_BF16_GRAD;
    if (priors.size()) {
      const DLTensor prior = describe(priors[i]);
      row.prior = prior.data;
      if (prior.dtype.code == kDLBfloat) row.kinds |= dph::LAPROP_BF16_PRIOR;
    }
    if (copies.size()) row.copy = data_of<uint16_t>(copies[i]);
    a.chunks += chunks_of(row.size);
  }
  a.tensors = table.data();
  a.count = table.size();
  a.settings = {settings[0], settings[1], settings[2], settings[3], settings[4], settings[5], settings[6], settings[7]};
  a.grad_scale = data_of(grad_scale);
  a.clock = data_of<dph::LapropClock>(clock);
  a.rate = data_of<double>(rate);
  const int threads = torch_threads();
  const py::gil_scoped_release released;
  dph::laprop_cpu(a, threads);
}

// The norm of gradients on the CPU, written with the scale and the flag into tensors of one element.
void gradient_norm_tensors(const py::sequence& grads, double max_norm, py::handle norm, py::handle scale,
                           py::handle finite) {
  std::vector<dph::GradientTensor> table(grads.size());
  dph::GradientNormArguments a{};
  for (size_t i = 0; i < table.size(); ++i) {
    const DLTensor grad = describe(grads[i]);
    table[i] = {grad.data, size_of(grad), a.chunks, grad.dtype.code == kDLBfloat ? dph::LAPROP_BF16_GRAD : 0};
    a.chunks += chunks_of(table[i].size);
  }
  std::vector<double> partials(a.chunks);
  a.tensors = table.data();
  a.count = table.size();
  a.max_norm = max_norm;
  a.partials = partials.data();
  a.norm = data_of<double>(norm);
  a.scale = data_of(scale);
  a.finite = data_of<bool>(finite);
  const int threads = torch_threads();
  const py::gil_scoped_release released;
  dph::gradient_norm_cpu(a, threads);
}

void bind_laprop_tensors(py::module_& module) {
  module.def("laprop_fits", &laprop_fits);
  module.def("laprop_tensors_cpu", &laprop_tensors);
  module.def("gradient_norm_tensors_cpu", &gradient_norm_tensors);
}

dph::AttentionRows attention_rows(const Described& tensor) {
  return {tensor.x.data, tensor.x.strides[0], tensor.x.strides[1]};
}

// ``target`` becomes the rows of ``source`` [T, H, D], rotated by ``sign`` times the angles of ``cos`` and ``sin``
// [T, D/2].
dph::RotateArguments rotate_arguments(const Described& source, const Described& target, py::handle cos, py::handle sin,
                                      float sign) {
  dph::RotateArguments a;
  a.in = attention_rows(source);
  a.out = attention_rows(target);
  a.cos = data_of(cos);
  a.sin = data_of(sin);
  a.rows = source.x.shape[0];
  a.heads = source.x.shape[1];
  a.head_dim = source.x.shape[2];
  a.sign = sign;
  a.in_bf16 = source.x.dtype.code == kDLBfloat;
  a.out_bf16 = target.x.dtype.code == kDLBfloat;
  return a;
}

py::object rotate(py::handle source, py::object target, py::handle cos, py::handle sin, float sign) {
  const Described from = last_contiguous(source), to(std::move(target));
  const dph::RotateArguments a = rotate_arguments(from, to, cos, sin, sign);
  const int threads = torch_threads();
  {
    const py::gil_scoped_release released;
    dph::rotate_cpu(a, threads);
  }
  return to.tensor;
}

// Inputs and results of both passes; ``work`` is (tiles, runs, bounds).
struct AttentionTensors {
  Described q, rotated, v, memory_k, memory_v, out, lse;

  dph::AttentionArguments arguments(py::handle q_cos, py::handle q_sin, const py::tuple& work, double scale) const {
    const DLTensor tiles = describe(work[0]);
    dph::AttentionArguments a;
    a.heads = q.x.shape[1];
    a.key_heads = v.x.shape[1];
    a.head_dim = q.x.shape[2];
    a.memory = memory_k.x.shape[0];
    a.scale = scale;
    a.bf16 = q.x.dtype.code == kDLBfloat;
    a.q = attention_rows(q);
    a.k = attention_rows(rotated);
    a.v = attention_rows(v);
    a.memory_k = attention_rows(memory_k);
    a.memory_v = attention_rows(memory_v);
    a.out = attention_rows(out);
    a.q_cos = data_of(q_cos);
    a.q_sin = data_of(q_sin);
    a.lse = static_cast<float*>(lse.x.data);
    a.work.count = tiles.shape[0];
    a.work.tiles = static_cast<const int32_t*>(tiles.data);
    a.work.runs = data_of<int32_t>(work[1]);
    a.work.bounds = data_of<int32_t>(work[2]);
    return a;
  }
};

// Rotates the keys and computes attention; returns (out, lse, rotated keys). The caller has checked the tensors.
// Arguments are positional, because keyword arguments would take longer than a few rows.
py::tuple attention_forward(py::handle q, py::handle k, py::handle v, py::handle memory_k, py::handle memory_v,
                            py::handle q_cos, py::handle q_sin, py::handle k_cos, py::handle k_sin,
                            const py::tuple& work, double scale) {
  const Described queries = last_contiguous(q), keys = last_contiguous(k);
  const Described lse(new_floats(q, {queries.x.shape[0], queries.x.shape[1]}));
  const AttentionTensors tensors{queries, empty_like(keys), last_contiguous(v), last_contiguous(memory_k),
                                 last_contiguous(memory_v), empty_like(queries), lse};
  const dph::RotateArguments rotation = rotate_arguments(keys, tensors.rotated, k_cos, k_sin, 1.0f);
  const dph::AttentionArguments a = tensors.arguments(q_cos, q_sin, work, scale);
  const int threads = torch_threads();
  {
    const py::gil_scoped_release released;
    dph::rotate_cpu(rotation, threads);
    dph::attention_forward_cpu(a, threads);
  }
  return py::make_tuple(tensors.out.tensor, lse.tensor, tensors.rotated.tensor);
}

// Returns the gradient of the queries, and adds to ``dk`` and ``dv``, those of the rotated keys and of the values: zeros
// of fp32 with a head for each of ``parts``.
py::object attention_backward(py::handle grad, py::handle q, py::object rotated, py::handle v, py::handle memory_k,
                              py::handle memory_v, py::object out, py::object lse, py::object dk, py::object dv,
                              py::handle q_cos, py::handle q_sin, const py::tuple& work, py::handle tasks,
                              int64_t parts, double scale) {
  const AttentionTensors tensors{last_contiguous(q), Described(rotated), last_contiguous(v), last_contiguous(memory_k),
                                 last_contiguous(memory_v), Described(out), Described(lse)};
  const Described dq = empty_like(tensors.q);
  const Described upstream = last_contiguous(grad), d_keys(dk), d_values(dv);
  const DLTensor starts = describe(tasks);
  dph::AttentionArguments a = tensors.arguments(q_cos, q_sin, work, scale);
  a.work.tasks = static_cast<const int32_t*>(starts.data);
  a.work.task_count = starts.shape[0] - 1;
  a.grad = attention_rows(upstream);
  a.dq = attention_rows(dq);
  a.dk = attention_rows(d_keys);
  a.dv = attention_rows(d_values);
  a.parts = parts;
  const int threads = torch_threads();
  {
    const py::gil_scoped_release released;
    dph::attention_backward_cpu(a, threads);
  }
  return dq.tensor;
}

// Whether attention's inputs are floating-point tensors on one device that fit together and have the layout's sizes
// (check_inputs of dph_kernels/rope_attention).
bool attention_fits(py::handle q, py::handle k, py::handle v, py::handle memory_k, py::handle memory_v,
                    py::handle positions, int64_t queries, int64_t keys, int64_t memory) {
  DLTensor x, rows;
  if (!peek_any(q, x) || x.ndim != 3 || x.shape[0] != queries || x.shape[2] % 2) return false;
  if (!is_floating(x) || !peek_any(positions, rows) || !is_on(rows, x.device)) return false;
  int64_t heads = -1;  // of the keys
  for (const auto& [tensor, size] : {std::pair{k, keys}, {v, keys}, {memory_k, memory}, {memory_v, memory}}) {
    if (!peek_any(tensor, rows) || !is_like(rows, x) || rows.ndim != 3) return false;
    if (heads < 0) heads = rows.shape[1];
    if (rows.shape[0] != size || rows.shape[1] != heads || rows.shape[2] != x.shape[2]) return false;
  }
  return heads > 0 && x.shape[1] > 0 && x.shape[1] % heads == 0;
}

void bind_attention(py::module_& module) {
  module.attr("ATTENTION_ROWS") = dph::ATTENTION_ROWS;
  module.attr("ATTENTION_BLOCK") = dph::ATTENTION_BLOCK;
  module.def("attention_lanes", &dph::attention_lanes);
  module.def("attention_fits", &attention_fits);
  module.def("attention_forward_cpu", &attention_forward);
  module.def("attention_backward_cpu", &attention_backward);
  module.def("rotate_cpu", &rotate);
}

dph::NormRows norm_rows(const DLTensor& x) {
  if (!x.data) return {};
  return {x.data, x.strides[0], x.ndim == 3 ? x.strides[1] : 0};
}

// Arguments of both passes. ``total``: the rows that are normalised.
dph::ResidualNorm residual_norm_arguments(const DLTensor& total, const DLTensor& weight, bool rms) {
  dph::ResidualNorm a;
  a.heads = total.ndim == 3 ? total.shape[1] : 1;
  a.rows = total.shape[0] * a.heads;
  a.columns = weight.shape[0];
  a.bf16 = weight.dtype.code == kDLBfloat;
  a.rms = rms;
  a.total = norm_rows(total);
  a.weight = weight.data;
  return a;
}

// ``moments`` of all rows: mean and 1 / standard deviation, of RMSNorm 1 / root mean square alone; null for none.
void set_moments(dph::ResidualNorm& a, float* moments) {
  a.mean = a.rms ? nullptr : moments;
  a.rstd = a.rms || !moments ? moments : moments + a.rows;
}

// The tensors of a forward pass, whose rows are contiguous.
struct NormInputs {
  py::handle x;
  DLTensor rows{}, update{}, weight{}, bias{};
  bool rms = false;
  double eps = 0.0;

  // Returns (total, normed); total is x if there is no update.
  py::tuple run(float* moments) const {
    const Described normed(empty_like(x, rows));
    const py::object total = update.ndim ? empty_like(x, rows) : py::reinterpret_borrow<py::object>(x);
    dph::ResidualNorm a = residual_norm_arguments(update.ndim ? describe(total) : rows, weight, rms);
    a.eps = static_cast<float>(eps);
    a.x = norm_rows(rows);
    a.update = norm_rows(update);
    a.bias = bias.data;
    a.normed = norm_rows(normed.x);
    set_moments(a, moments);
    const int threads = torch_threads();
    {
      const py::gil_scoped_release released;
      dph::residual_norm_forward_cpu(a, threads);
    }
    return py::make_tuple(total, normed.tensor);
  }
};

// The sum of both (of one if ``update`` is None), and its LayerNorm, in PyTorch's operations: their gradients are C++.
py::tuple layer_norm(py::handle x, py::handle update, py::handle weight, py::handle bias, py::handle eps,
                     int64_t columns) {
  static PyObject* const norm = attribute("torch", "layer_norm");
  const py::object total = update.is_none() ? py::reinterpret_borrow<py::object>(x)
                                            : checked(PyNumber_Add(x.ptr(), update.ptr()));
  const py::tuple shape = py::make_tuple(columns);
  PyObject* const arguments[] = {total.ptr(), shape.ptr(), weight.ptr(), bias.ptr(), eps.ptr()};
  return py::make_tuple(total, checked(PyObject_Vectorcall(norm, arguments, 5, nullptr)));
}

// A usual call of the operator, see dispatch.usual_call. A LayerNorm of up to ``few`` elements is computed by PyTorch.
py::object residual_norm(py::handle x, py::handle update, py::handle weight, py::handle bias, py::handle eps,
                         py::handle kind, py::handle few) {
  constexpr int64_t WIDEST = 16384;  // columns that "auto" leaves to kernels, on every device
  NormInputs a;
  a.x = x;
  a.rms = is_text(kind, "rms");
  if (!(a.rms ? bias.is_none() : is_text(kind, "layer"))) return py::none();
  if (!PyFloat_CheckExact(eps.ptr()) || !(PyFloat_AS_DOUBLE(eps.ptr()) >= 0.0)) return py::none();
  a.eps = PyFloat_AS_DOUBLE(eps.ptr());
  if (!peek(x, a.rows) || !peek(weight, a.weight) || !is_kernel_float(a.rows)) return py::none();
  if (a.rows.ndim < 2 || a.rows.ndim > 3 || !has_rows(a.rows)) return py::none();
  const int64_t columns = a.rows.shape[a.rows.ndim - 1];
  if (columns > WIDEST || !is_vector(a.weight, columns, a.rows)) return py::none();
  if (!update.is_none() && !(peek(update, a.update) && is_alike(a.update, a.rows) && has_rows(a.update))) {
    return py::none();
  }
  if (!bias.is_none() && !(peek(bias, a.bias) && is_vector(a.bias, columns, a.rows))) return py::none();
  if (!a.rms && size_of(a.rows) <= integer(few)) {
    if (in_forward_mode()) return py::none();
    return layer_norm(x, update, weight, bias, eps, columns);
  }
  for (const auto& [tensor, metadata] : {std::pair{x, &a.rows}, {update, &a.update}, {weight, &a.weight}, {bias, &a.bias}}) {
    if (!tensor.is_none() && !is_whole(tensor, *metadata)) return py::none();
  }
  if (intercepted() || profiled_or_cast() || needs_gradients({x, update, weight, bias})) return py::none();
  return a.run(nullptr);
}

// Returns (total, normed, moments [2, T] or [2, T, H], of RMSNorm [1, ...]); total is x if there is no update.
py::tuple residual_norm_forward(py::handle x, py::handle update, py::handle weight, py::handle bias, double eps,
                                bool rms) {
  const Described rows = last_contiguous(x), added = last_contiguous(update);
  const Described scale = last_contiguous(weight), shift = last_contiguous(bias);
  std::vector<int64_t> sizes{rms ? 1 : 2};
  sizes.insert(sizes.end(), rows.x.shape, rows.x.shape + rows.x.ndim - 1);
  const py::object moments = new_floats(x, sizes);
  const NormInputs a{rows.tensor, rows.x, added.x, scale.x, shift.x, rms, eps};
  const py::tuple results = a.run(data_of(moments));
  return py::make_tuple(results[0], results[1], moments);
}

// Returns the gradients of (x and update, weight, bias); those that are not needed are empty.
py::tuple residual_norm_backward(py::handle d_total, py::handle d_normed, py::handle total, py::handle weight,
                                 py::handle moments, const std::array<bool, 3>& needs) {
  const Described d_sum = last_contiguous(d_total), d_rows = last_contiguous(d_normed);
  const Described rows = last_contiguous(total), scale = last_contiguous(weight);
  const DLTensor statistics = describe(moments);
  const auto result = [&](size_t i, const Described& like) {
    return needs[i] ? empty_like(like) : Described(new_empty(like.tensor, {0}));
  };
  const Described d_x = result(0, rows), d_weight = result(1, scale), d_bias = result(2, scale);
  dph::ResidualNorm a = residual_norm_arguments(rows.x, scale.x, statistics.shape[0] == 1);
  set_moments(a, static_cast<float*>(statistics.data));
  a.d_total = norm_rows(d_sum.x);
  a.d_normed = norm_rows(d_rows.x);
  a.d_x = norm_rows(d_x.x);
  a.d_weight = d_weight.x.data;
  a.d_bias = d_bias.x.data;
  const int threads = torch_threads();
  {
    const py::gil_scoped_release released;
    dph::residual_norm_backward_cpu(a, threads);
  }
  return py::make_tuple(d_x.tensor, d_weight.tensor, d_bias.tensor);
}

void bind_residual_norm(py::module_& module) {
  define<residual_norm>(module, "residual_norm", std::make_index_sequence<7>());
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

dph::SwigluArguments swiglu_arguments(const DLTensor& projected, const DLTensor& bias) {
  dph::SwigluArguments a;
  a.rows = projected.shape[0];
  a.columns = projected.shape[1] / 2;
  a.bf16 = projected.dtype.code == kDLBfloat;
  a.projected = projected.data;
  a.projected_row = projected.strides[0];
  a.bias = static_cast<const float*>(bias.data);
  return a;
}

py::object run_swiglu(py::handle projected, const DLTensor& rows, const DLTensor& bias) {
  dph::SwigluArguments a = swiglu_arguments(rows, bias);
  Described out(new_empty(projected, {a.rows, a.columns}));
  a.out = out.x.data;
  const int threads = torch_threads();
  {
    const py::gil_scoped_release released;
    dph::swiglu_forward_cpu(a, threads);
  }
  return out.tensor;
}

// The caller has checked the tensors; ``bias`` is fp32, or None.
py::object swiglu_forward(py::handle projected, py::handle bias) {
  const Described rows = last_contiguous(projected), shift = last_contiguous(bias);
  return run_swiglu(rows.tensor, rows.x, shift.x);
}

// A usual call of the operator, see dispatch.usual_call.
py::object swiglu(py::handle projected, py::handle bias) {
  DLTensor rows, shift{};
  if (!readable(projected, rows) || !is_kernel_float(rows) || rows.ndim != 2 || !has_rows(rows)) return py::none();
  if (rows.shape[1] % 2) return py::none();
  if (!bias.is_none()) {
    if (!readable(bias, shift) || !is_vector(shift, rows.shape[1], rows) || shift.dtype.bits != 32) return py::none();
  }
  if (intercepted() || profiled_or_cast()) return py::none();
  if (needs_gradients({projected, bias})) return py::bool_(true);
  return run_swiglu(projected, rows, shift);
}

// Returns the gradient of ``projected``, and that of the bias as a sum for each chunk of rows; None unless needed.
py::tuple swiglu_backward(py::handle grad, py::handle projected, py::handle bias, bool projected_needed,
                          bool bias_needed) {
  const Described upstream = last_contiguous(grad), rows = last_contiguous(projected), shift = last_contiguous(bias);
  dph::SwigluArguments a = swiglu_arguments(rows.x, shift.x);
  const int64_t chunks = (a.rows + dph::SWIGLU_CHUNK - 1) / dph::SWIGLU_CHUNK;
  const Described d_projected(projected_needed ? empty_like(rows.tensor, rows.x) : py::none());
  const Described sums(bias_needed ? new_floats(projected, {chunks, rows.x.shape[1]}) : py::none());
  a.grad = upstream.x.data;
  a.grad_row = upstream.x.strides[0];
  a.d_projected = d_projected.x.data;
  a.sums = static_cast<float*>(sums.x.data);
  const int threads = torch_threads();
  {
    const py::gil_scoped_release released;
    dph::swiglu_backward_cpu(a, threads);
  }
  return py::make_tuple(d_projected.tensor, sums.tensor);
}

void bind_swiglu(py::module_& module) {
  module.attr("SWIGLU_CHUNK") = dph::SWIGLU_CHUNK;
  define<swiglu>(module, "swiglu", std::make_index_sequence<2>());
  module.def("swiglu_forward_cpu", &swiglu_forward);
  module.def("swiglu_backward_cpu", &swiglu_backward);
}

dph::RewardMatrix reward_matrix(py::handle tensor) {
  const DLTensor x = describe(tensor);
  if (!x.data) return {};
  return {x.data, x.strides[0], x.ndim == 2 ? x.strides[1] : 0};
}

// Arguments of both passes. ``dropouts``: (threshold, stream, fraction that is kept) of the input, then of the pooled
// state. Results of the forward pass that are not kept are empty.
dph::SwigluRewardArguments swiglu_reward_arguments(py::handle hidden, py::handle reward, py::handle w1, py::handle w2,
                                                   py::handle row_ids, const py::tuple& dropouts, uint64_t seed,
                                                   py::handle projected, py::handle pooled) {
  const DLTensor states = describe(hidden), first = describe(w1);
  const auto dropout = [&](size_t index) {
    const py::tuple x = dropouts[index];
    return dph::RewardDropout{x[0].cast<uint32_t>(), x[1].cast<uint32_t>(), x[2].cast<float>()};
  };
  dph::SwigluRewardArguments a;
  a.rows = states.shape[0];
  a.columns = states.shape[1];
  a.width = first.ndim ? first.shape[0] / 2 : 0;
  a.heads = describe(reward).shape[0];
  a.bf16 = states.dtype.code == kDLBfloat;
  a.hidden = reward_matrix(hidden);
  a.reward = reward_matrix(reward);
  a.w1 = reward_matrix(w1);
  a.w2 = reward_matrix(w2);
  a.row_ids = data_of<int64_t>(row_ids);
  a.seed = seed;
  a.input = dropout(0);
  a.pooled = dropout(1);
  a.kept_projected = data_of(projected);
  a.kept_pooled = data_of(pooled);
  return a;
}

// The caller has checked the tensors. Arguments are positional, because keyword arguments would take longer than a few
// rows.
void swiglu_reward_forward(py::handle hidden, py::handle reward, py::handle w1, py::handle b1, py::handle w2,
                           py::handle b2, py::handle row_ids, const py::tuple& dropouts, uint64_t seed,
                           py::handle rewards, py::handle projected, py::handle pooled, int threads) {
  dph::SwigluRewardArguments a =
      swiglu_reward_arguments(hidden, reward, w1, w2, row_ids, dropouts, seed, projected, pooled);
  a.b1 = reward_matrix(b1);
  a.b2 = reward_matrix(b2);
  a.rewards = data_of(rewards);
  const py::gil_scoped_release released;
  dph::swiglu_reward_forward_cpu(a, threads);
}

// ``grads``: results in the order hidden, reward, w1, b1, w2, b2, empty if not requested.
void swiglu_reward_backward(py::handle grad, py::handle hidden, py::handle reward, py::handle w1, py::handle w2,
                            py::handle row_ids, const py::tuple& dropouts, uint64_t seed, py::handle projected,
                            py::handle pooled, const py::tuple& grads, int threads) {
  dph::SwigluRewardArguments a =
      swiglu_reward_arguments(hidden, reward, w1, w2, row_ids, dropouts, seed, projected, pooled);
  const DLTensor upstream = describe(grad);
  a.grad = static_cast<const float*>(upstream.data);
  a.grad_row = upstream.strides[0];
  a.grad_column = upstream.strides[1];
  void** const results[] = {&a.d_hidden, &a.d_reward, &a.d_w1, &a.d_b1, &a.d_w2, &a.d_b2};
  for (size_t i = 0; i < 6; ++i) *results[i] = data_of<void>(grads[i]);
  const py::gil_scoped_release released;
  dph::swiglu_reward_backward_cpu(a, threads);
}

// Whether the inputs are floating-point tensors on one device that fit together (_check_weights of
// dph_kernels/swiglu_reward).
bool swiglu_reward_fits(py::handle hidden, py::handle reward, py::handle w1, py::handle b1, py::handle w2,
                        py::handle b2) {
  DLTensor rows, vectors, first, second, bias;
  if (!peek_any(hidden, rows) || rows.ndim != 2 || !is_floating(rows)) return false;
  const int64_t columns = rows.shape[1];
  const auto is_matrix = [&](py::handle tensor, DLTensor& found, int64_t width) {
    const bool fits = peek_any(tensor, found) && is_like(found, rows) && found.ndim == 2;
    return fits && found.shape[0] && found.shape[1] == width;
  };
  const auto is_bias = [&](py::handle tensor, int64_t size) {
    if (tensor.is_none()) return true;
    return peek_any(tensor, bias) && is_like(bias, rows) && bias.ndim == 1 && bias.shape[0] == size;
  };
  if (!is_matrix(reward, vectors, columns)) return false;
  int64_t width = columns;
  if (!w1.is_none()) {
    if (!is_matrix(w1, first, columns) || first.shape[0] % 2 || !is_bias(b1, first.shape[0])) return false;
    width = first.shape[0] / 2;
  }
  if (w2.is_none()) return w1.is_none() && b1.is_none() && b2.is_none();
  if (w1.is_none() && !b1.is_none()) return false;
  return is_matrix(w2, second, width) && second.shape[0] == columns && is_bias(b2, columns);
}

void bind_swiglu_reward(py::module_& module) {
  module.attr("REWARD_LANES") = dph::REWARD_LANES;
  module.def("swiglu_reward_fits", &swiglu_reward_fits);
  module.def("swiglu_reward_lanes", &dph::swiglu_reward_lanes);
  module.def("swiglu_reward_forward_cpu", &swiglu_reward_forward);
  module.def("swiglu_reward_backward_cpu", &swiglu_reward_backward);
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
  module.def("can_bypass_dispatcher", &can_bypass_dispatcher);
  module.def("is_usual_gradient", &is_usual_gradient);
  bind_laprop_tensors(module);
  bind_attention(module);
  bind_laprop(module);
  bind_linear_logprob(module);
  bind_preference_loss(module);
  bind_residual_norm(module);
  bind_linear(module);
  bind_swiglu(module);
  bind_swiglu_reward(module);
}
