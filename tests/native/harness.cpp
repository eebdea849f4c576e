// Runs the CPU kernels, without Python, on the cases in a file and compares their results with those stored there, which
// tests/helpers/native_cases.py computes in fp64. Exit code 0: all results are within their bounds.
#include "attention.h"
#include "laprop.h"
#include "linear.h"
#include "linear_logprob.h"
#include "preference_loss.h"
#include "residual_norm.h"
#include "swiglu.h"
#include "swiglu_reward.h"

#include <math.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace dph;

[[noreturn]] void fail(const std::string& message) {
  fprintf(stderr, "harness: %s\n", message.c_str());
  exit(2);
}

// One array of the file.
struct Array {
  char type = 0;  // f: float, h: bf16, d: double, q: int64, i: int32
  int64_t count = 0;
  std::vector<double> storage;  // aligned for every type
  void* data() { return storage.data(); }
};

int64_t size_of(char type) {
  switch (type) {
    case 'f': case 'i': return 4;
    case 'h': return 2;
    case 'd': case 'q': return 8;
    default: fail(std::string("unknown type ") + type);
  }
}

template <class T>
constexpr char type_of();
template <>
constexpr char type_of<float>() { return 'f'; }
template <>
constexpr char type_of<uint16_t>() { return 'h'; }
template <>
constexpr char type_of<double>() { return 'd'; }
template <>
constexpr char type_of<int64_t>() { return 'q'; }
template <>
constexpr char type_of<int32_t>() { return 'i'; }

Array make(char type, int64_t count) {
  Array array{type, count, {}};
  array.storage.assign(count * size_of(type) / 8 + 1, NAN);  // an element that is not written shows
  return array;
}

double element(Array& array, int64_t i) {
  switch (array.type) {
    case 'f': return static_cast<float*>(array.data())[i];
    case 'h': return float_from_bf16(static_cast<uint16_t*>(array.data())[i]);
    case 'd': return static_cast<double*>(array.data())[i];
    case 'q': return static_cast<double>(static_cast<int64_t*>(array.data())[i]);
    default: return static_cast<int32_t*>(array.data())[i];
  }
}

// Inputs of a case, expected results ("= name") with their bounds ("~ name"), and the results.
class Case {
 public:
  std::string title;

  void add(const std::string& name, Array array) { inputs_[name] = std::move(array); }

  bool has(const std::string& name) const { return inputs_.count(name) > 0; }

  Array& array(const std::string& name) {
    if (!has(name)) fail(title + ": no " + name);
    return inputs_[name];
  }

  int64_t integer(const std::string& name) { return *in<int64_t>(name); }
  double number(const std::string& name) { return *in<double>(name); }
  bool bf16(const std::string& name) { return array(name).type == 'h'; }

  // Address of an input, null if the case does not have it.
  void* data(const std::string& name) { return has(name) ? array(name).data() : nullptr; }

  template <class T>
  T* in(const std::string& name) {
    if (!has(name)) return nullptr;
    if (array(name).type != type_of<T>()) fail(title + ": unexpected type of " + name);
    return static_cast<T*>(data(name));
  }

  // Address of a result that the case expects, else null.
  void* out(const std::string& name, char type) {
    if (!has("= " + name)) return nullptr;
    results_[name] = make(type, array("= " + name).count);
    return results_[name].data();
  }

  template <class T>
  T* out(const std::string& name) {
    return static_cast<T*>(out(name, type_of<T>()));
  }

  // Address of a result that starts as a copy of the input of the same name.
  void* updated(const std::string& name) {
    results_[name] = array(name);
    return results_[name].data();
  }

  // Memory that is not compared with anything.
  float* scratch(int64_t floats) {
    scratch_.push_back(make('f', floats));
    return static_cast<float*>(scratch_.back().data());
  }

  // Prints each result's largest error and returns the number of wrong results.
  int check() {
    int wrong = 0;
    for (auto& [key, expected] : inputs_) {
      if (key.rfind("= ", 0) != 0) continue;
      const std::string name = key.substr(2);
      if (!results_.count(name)) fail(title + ": " + name + " was not computed");
      Array& result = results_[name];
      if (result.count != expected.count) fail(title + ": unexpected size of " + name);
      const double bound = number("~ " + name);
      double error = 0.0;
      for (int64_t i = 0; i < expected.count; ++i) {
        const double got = element(result, i), want = element(expected, i);
        const bool equal = got == want || (got != got && want != want);
        const double difference = equal ? 0.0 : fabs(got - want);
        error = std::max(error, isnan(difference) ? INFINITY : difference);
      }
      const bool good = error <= bound;
      printf("%s %s: %s, error %.3g, bound %.3g\n", good ? "ok" : "WRONG", title.c_str(), name.c_str(), error, bound);
      wrong += !good;
    }
    return wrong;
  }

 private:
  std::map<std::string, Array> inputs_, results_;
  std::vector<Array> scratch_;
};

int threads = 1;

void run_linear(Case& c) {
  LinearArguments a;
  a.rows = c.integer("rows");
  a.columns = c.integer("columns");
  a.depth = c.integer("depth");
  a.x = c.in<float>("x");
  a.x_row = a.depth;
  a.weight = c.data("weight");
  a.weight_row = a.depth;
  a.bf16 = c.bf16("weight");
  a.bias = c.in<float>("bias");
  a.out = c.out<float>("out");
  a.out_row = a.columns;
  linear_forward_cpu(a, threads);
}

void run_linear_logprob(Case& c) {
  const int64_t rows = c.integer("rows"), columns = c.integer("columns"), split = c.integer("split");
  LogprobTile tile;
  tile.rows = rows;
  tile.stride = columns;
  tile.targets = c.in<int64_t>("targets");
  tile.largest = c.out<float>("largest");
  tile.log_sum = c.out<float>("log_sum");
  tile.logprobs = c.out<float>("logprobs");
  tile.entropy = c.out<float>("entropy");
  tile.best = c.out<int64_t>("best");
  tile.upstream = c.in<float>("upstream");
  float* logits = c.out<float>("gradient");
  memcpy(logits, c.in<float>("logits"), rows * columns * sizeof(float));
  auto part = [&](int64_t first, int64_t last) {
    LogprobTile result = tile;
    result.logits = logits + first;
    result.first = first;
    result.columns = last - first;
    result.last = last == columns;
    return result;
  };
  if (split == 0) {  // the gradients for upstream gradients of 1, as factors
    std::vector<float> factors(rows);
    tile.factors = factors.data();
    linear_logprob_keep_cpu(part(0, columns), threads);
    for (int64_t i = 0; i < rows * columns; ++i) logits[i] *= factors[i / columns] * tile.upstream[i / columns];
    return;
  }
  for (int64_t first = 0; first < columns; first += split) {
    linear_logprob_reduce_cpu(part(first, std::min(first + split, columns)), threads);
  }
  for (int64_t first = 0; first < columns; first += split) {
    linear_logprob_gradient_cpu(part(first, std::min(first + split, columns)), threads);
  }
}

void run_preference_loss(Case& c) {
  const int64_t pairs = c.integer("pairs"), heads = c.integer("heads");
  std::vector<PreferenceInput> rewards, logprobs;
  for (const char* name : {"chosen", "rejected"}) {  // [K, N]: the rewards of a head are adjacent
    if (c.has(name)) rewards.push_back({c.data(name), 1, pairs, c.bf16(name)});
  }
  for (const char* name : {"policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"}) {
    if (c.has(name)) logprobs.push_back({c.data(name), 1, 1, c.bf16(name)});
  }
  PreferenceArguments a{};
  a.rewards = rewards.empty() ? nullptr : rewards.data();
  a.logprobs = logprobs.empty() ? nullptr : logprobs.data();
  a.pairs = pairs;
  a.heads = heads;
  a.beta = static_cast<float>(c.number("beta"));
  a.dpo_epsilon = static_cast<float>(c.number("dpo_epsilon"));
  a.dph_epsilon = static_cast<float>(c.number("dph_epsilon"));
  a.dpo_weight = static_cast<float>(c.number("dpo_weight"));
  a.dph_weight = static_cast<float>(c.number("dph_weight"));
  a.contrastive = c.integer("contrastive");
  a.loss = c.out<float>("loss");
  a.metrics = c.out<float>("metrics");
  a.slopes = c.out<float>("slopes");
  preference_loss_cpu(a, threads);
  std::vector<PreferenceGradient> gradients;
  const int64_t sizes[] = {pairs * heads, pairs * heads, pairs, pairs};
  const char* names[] = {"d_chosen", "d_rejected", "d_policy_chosen", "d_policy_rejected"};
  for (int i = 0; i < 4; ++i) {
    if (float* gradient = c.out<float>(names[i])) gradients.push_back({gradient, sizes[i]});
  }
  preference_loss_gradients_cpu(a.slopes, static_cast<float>(c.number("grad")), gradients.data(), gradients.size(),
                                threads);
}

void run_residual_norm(Case& c) {
  ResidualNorm a;
  a.rows = c.integer("rows");
  a.heads = c.integer("heads");
  a.columns = c.integer("columns");
  a.bf16 = c.bf16("x");
  a.rms = c.integer("rms");
  a.eps = static_cast<float>(c.number("eps"));
  const char type = c.array("x").type;
  auto rows = [&](void* data) { return NormRows{data, a.heads * a.columns, a.columns}; };
  a.x = rows(c.data("x"));
  a.update = rows(c.data("update"));
  a.total = a.update.data ? rows(c.out("total", type)) : a.x;
  a.weight = c.data("weight");
  a.bias = c.data("bias");
  a.mean = c.out<float>("mean");
  a.rstd = c.out<float>("rstd");
  a.normed = rows(c.out("normed", type));
  residual_norm_forward_cpu(a, threads);
  a.d_total = rows(c.data("d_total"));
  a.d_normed = rows(c.data("d_normed"));
  a.d_x = rows(c.out("d_x", type));
  a.d_weight = c.out("d_weight", type);
  a.d_bias = c.out("d_bias", type);
  residual_norm_backward_cpu(a, threads);
}

void run_swiglu(Case& c) {
  SwigluArguments a;
  a.rows = c.integer("rows");
  a.columns = c.integer("columns");
  a.bf16 = c.bf16("projected");
  const char type = c.array("projected").type;
  a.projected = c.data("projected");
  a.projected_row = 2 * a.columns;
  a.bias = c.in<float>("bias");
  a.out = c.out("out", type);
  swiglu_forward_cpu(a, threads);
  a.grad = c.data("grad");
  a.grad_row = a.columns;
  a.d_projected = c.out("d_projected", type);
  a.sums = c.out<float>("sums");
  swiglu_backward_cpu(a, threads);
}

void run_swiglu_reward(Case& c) {
  SwigluRewardArguments a;
  a.rows = c.integer("rows");
  a.columns = c.integer("columns");
  a.width = c.integer("width");
  a.heads = c.integer("heads");
  a.bf16 = c.bf16("hidden");
  const char type = c.array("hidden").type;
  const bool turned = c.integer("turned");  // whether the weights are stored by columns
  const int64_t depth = a.width ? a.width : a.columns;
  auto matrix = [&](const char* name, int64_t rows, int64_t columns, bool by_columns) {
    if (!c.has(name)) return RewardMatrix{};
    return by_columns ? RewardMatrix{c.data(name), 1, rows} : RewardMatrix{c.data(name), columns, 1};
  };
  a.hidden = matrix("hidden", a.rows, a.columns, false);
  a.reward = matrix("reward", a.heads, a.columns, false);
  a.w1 = matrix("w1", 2 * a.width, a.columns, turned);
  a.w2 = matrix("w2", a.columns, depth, turned);
  a.b1 = {c.data("b1"), 1, 0};
  a.b2 = {c.data("b2"), 1, 0};
  a.row_ids = c.in<int64_t>("row_ids");
  a.seed = static_cast<uint64_t>(c.integer("seed"));
  auto dropout = [&](const std::string& name) {
    return RewardDropout{static_cast<uint32_t>(c.integer(name + "_threshold")),
                         static_cast<uint32_t>(c.integer(name + "_stream")),
                         static_cast<float>(c.number(name + "_keep"))};
  };
  a.input = dropout("input");
  a.pooled = dropout("pooled");
  a.rewards = c.out<float>("rewards");
  const int64_t lanes = (a.rows + REWARD_LANES - 1) / REWARD_LANES * REWARD_LANES;
  if (a.width) a.kept_projected = c.scratch(2 * a.width * lanes);
  if (a.w2.data) a.kept_pooled = c.scratch(a.columns * lanes);
  swiglu_reward_forward_cpu(a, threads);
  a.grad = c.in<float>("grad");
  a.grad_row = a.heads;
  a.grad_column = 1;
  a.d_hidden = c.out("d_hidden", type);
  a.d_reward = c.out("d_reward", type);
  a.d_w1 = c.out("d_w1", type);
  a.d_b1 = c.out("d_b1", type);
  a.d_w2 = c.out("d_w2", type);
  a.d_b2 = c.out("d_b2", type);
  swiglu_reward_backward_cpu(a, threads);
}

void run_laprop(Case& c) {
  const int64_t count = c.integer("tensors");
  std::vector<LapropTensor> tensors;
  std::vector<GradientTensor> gradients;
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const std::string end = " " + std::to_string(i);
    const int64_t size = c.array("param" + end).count;
    const int64_t grad_kind = c.bf16("grad" + end) ? LAPROP_BF16_GRAD : 0;
    const int64_t prior_kind = c.has("prior" + end) && c.bf16("prior" + end) ? LAPROP_BF16_PRIOR : 0;
    void* const grad = c.data("grad" + end);
    tensors.push_back({static_cast<float*>(c.updated("param" + end)), static_cast<float*>(c.updated("exp_avg" + end)),
                       static_cast<float*>(c.updated("exp_avg_sq" + end)), grad, c.data("prior" + end),
                       c.out<uint16_t>("copy" + end), size, chunks, grad_kind | prior_kind});
    gradients.push_back({grad, size, chunks, grad_kind});
    chunks += (size + LAPROP_CHUNK - 1) / LAPROP_CHUNK;
  }
  std::vector<double> partials(chunks);
  bool finite = false;
  float* const scale = c.out<float>("scale");
  gradient_norm_cpu({gradients.data(), count, chunks, c.number("max_norm"), partials.data(), c.out<double>("norm"),
                     scale, &finite},
                    threads);
  *c.out<float>("finite") = finite;
  const LapropSettings settings = {c.number("lr"),           c.number("beta1"),       c.number("beta2"),
                                   c.number("eps"),          c.number("weight_decay"), c.number("prior_decay"),
                                   c.number("bias_correction"), c.number("momentum_scale")};
  auto* const clock = static_cast<LapropClock*>(c.has("clock") ? c.updated("clock") : nullptr);
  laprop_cpu({tensors.data(), count, chunks, settings, scale, clock, nullptr, nullptr}, threads);
}

void run_attention(Case& c) {
  const int64_t heads = c.integer("heads"), key_heads = c.integer("key_heads"), size = c.integer("head_dim");
  const int64_t keys = c.integer("keys"), parts = c.integer("parts");
  const bool bf16 = c.bf16("q");
  const char type = c.array("q").type;
  auto rows = [&](void* data, int64_t count) { return AttentionRows{data, count * size, size}; };
  // Rotates keys by ``sign`` times their angles.
  auto rotate = [&](AttentionRows from, bool from_bf16, AttentionRows to, bool to_bf16, float sign) {
    RotateArguments a;
    a.in = from;
    a.out = to;
    a.cos = c.in<float>("k_cos");
    a.sin = c.in<float>("k_sin");
    a.rows = keys;
    a.heads = key_heads;
    a.head_dim = size;
    a.sign = sign;
    a.in_bf16 = from_bf16;
    a.out_bf16 = to_bf16;
    rotate_cpu(a, threads);
  };
  AttentionArguments a;
  a.heads = heads;
  a.key_heads = key_heads;
  a.head_dim = size;
  a.memory = c.integer("memory");
  a.scale = c.number("scale");
  a.bf16 = bf16;
  a.q = rows(c.data("q"), heads);
  a.k = rows(c.out("rotated", type), key_heads);
  a.v = rows(c.data("v"), key_heads);
  a.memory_k = rows(c.data("memory_k"), key_heads);
  a.memory_v = rows(c.data("memory_v"), key_heads);
  a.out = rows(c.out("out", type), heads);
  a.q_cos = c.in<float>("q_cos");
  a.q_sin = c.in<float>("q_sin");
  a.lse = c.out<float>("lse");
  rotate(rows(c.data("k"), key_heads), bf16, a.k, bf16, 1.0f);
  a.work.bounds = c.in<int32_t>("bounds");
  a.work.tiles = c.in<int32_t>("forward_tiles");
  a.work.runs = c.in<int32_t>("forward_runs");
  a.work.count = c.array("forward_tiles").count / 6;
  attention_forward_cpu(a, threads);

  a.work.tiles = c.in<int32_t>("backward_tiles");
  a.work.runs = c.in<int32_t>("backward_runs");
  a.work.count = c.array("backward_tiles").count / 6;
  a.work.tasks = c.in<int32_t>("backward_tasks");
  a.work.task_count = c.array("backward_tasks").count - 1;
  const int64_t slots = key_heads * parts;
  float *d_rotated = c.scratch(keys * slots * size), *d_values = c.scratch(keys * slots * size);
  memset(d_rotated, 0, keys * slots * size * sizeof(float));
  memset(d_values, 0, keys * slots * size * sizeof(float));
  a.grad = rows(c.data("grad"), heads);
  a.dq = rows(c.out("dq", type), heads);
  a.dk = rows(d_rotated, slots);
  a.dv = rows(d_values, slots);
  a.parts = parts;
  attention_backward_cpu(a, threads);
  // The sum over the parts of a head, as the callers compute it.
  float *d_keys = c.scratch(keys * key_heads * size), *dv = c.out<float>("dv");
  for (int64_t i = 0; i < keys * key_heads; ++i) {
    for (int64_t d = 0; d < size; ++d) {
      d_keys[i * size + d] = dv[i * size + d] = 0.0f;
      for (int64_t part = 0; part < parts; ++part) {
        d_keys[i * size + d] += d_rotated[(i * parts + part) * size + d];
        dv[i * size + d] += d_values[(i * parts + part) * size + d];
      }
    }
  }
  rotate(rows(d_keys, key_heads), false, rows(c.out("dk", type), key_heads), bf16, -1.0f);
}

const std::map<std::string, std::function<void(Case&)>> OPERATORS = {
    {"attention", run_attention},
    {"laprop", run_laprop},
    {"linear", run_linear},
    {"linear_logprob", run_linear_logprob},
    {"preference_loss", run_preference_loss},
    {"residual_norm", run_residual_norm},
    {"swiglu", run_swiglu},
    {"swiglu_reward", run_swiglu_reward},
};

// The file: for each case its title (the operator comes first) and number of arrays, for each array its name, type,
// number of elements and the elements. Strings are preceded by their length; numbers are int64.
class File {
 public:
  explicit File(const char* path) : file_(fopen(path, "rb")) {
    if (!file_) fail(std::string("cannot open ") + path);
  }
  ~File() { fclose(file_); }

  bool at_end() {
    const int next = fgetc(file_);
    if (next != EOF) ungetc(next, file_);
    return next == EOF;
  }

  void bytes(void* to, size_t count) {
    if (fread(to, 1, count, file_) != count) fail("the file ends early");
  }

  int64_t number() {
    int64_t value;
    bytes(&value, sizeof value);
    return value;
  }

  std::string text() {
    std::string value(number(), ' ');
    bytes(value.data(), value.size());
    return value;
  }

  Case next() {
    Case result;
    result.title = text();
    for (int64_t left = number(); left > 0; --left) {
      const std::string name = text();
      const char type = text()[0];
      Array array = make(type, number());
      bytes(array.data(), array.count * size_of(type));
      result.add(name, std::move(array));
    }
    return result;
  }

 private:
  FILE* file_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) fail("expected two arguments: number of threads, file of cases");
  threads = atoi(arguments[1]);
  File file(arguments[2]);
  int wrong = 0;
  while (!file.at_end()) {
    Case c = file.next();
    const auto found = OPERATORS.find(c.title.substr(0, c.title.find(' ')));
    if (found == OPERATORS.end()) fail("unknown operator: " + c.title);
    found->second(c);
    wrong += c.check();
  }
  if (wrong) printf("%d results are out of bounds\n", wrong);
  return wrong ? 1 : 0;
}
