// Joint preference objective on the CPU. cDPO is the contrastive objective on implicit rewards, so one loop serves
// both. Partial sums over fixed groups of pairs are added in order, so results do not depend on the number of threads.
#include "../preference_loss.h"
#include "instruction_sets.h"

#include <math.h>

#include <algorithm>
#include <vector>

namespace dph {
namespace {

constexpr int64_t BLOCK = 256;   // pairs processed at a time, within the L1 cache
constexpr int64_t GROUP = 4096;  // pairs per partial sum in double
constexpr int64_t LEAST = 8;     // minimum number of groups to use several threads
// Minimum number of judgements (pairs times heads, including the policy) to use wide vectors: a CPU that has not used
// them recently may take tens of microseconds to power them up, longer than the loss of few pairs.
constexpr int64_t WIDE = 4096;

// One part of the objective: pairs of rewards, explicit or implicit.
struct Part {
  const PreferenceInput* inputs;
  int64_t heads;
  bool implicit;
  float beta;
  float epsilon;
  bool contrastive;
  bool wide;        // use the widest vectors of the CPU
  float scale;      // factor of the slopes
  float* chosen;    // slopes [N, K]
  float* rejected;
};

// Sums over pairs, in the order of HEAD_METRICS.
struct Sums {
  double loss = 0, right = 0, margin = 0, chosen = 0, rejected = 0;

  void add(const Sums& other) {
    loss += other.loss;
    right += other.right;
    margin += other.margin;
    chosen += other.chosen;
    rejected += other.rejected;
  }
};

// s(x) = softplus(-x) + epsilon x, and its derivative epsilon - sigmoid(-x), from one exponential and one division.
DPH_INLINE float smoothed(float x, float epsilon, float& slope) {
  const float size = fabsf(x), e = size > 87.0f ? 0.0f : exp_of(-size);
  const float inverse = 1.0f / ((1.0f + e) * (2.0f + e));
  const float small = (2.0f + e) * inverse;  // 1 / (1 + e)
  slope = epsilon - (x < 0.0f ? small : e * small);
  // log(1 + e) = 2 artanh(u), u = e / (2 + e) <= 1/3
  const float u = e * (1.0f + e) * inverse, square = u * u;
  float p = 1.0f / 15.0f;
  p = p * square + 1.0f / 13.0f;
  p = p * square + 1.0f / 11.0f;
  p = p * square + 1.0f / 9.0f;
  p = p * square + 1.0f / 7.0f;
  p = p * square + 1.0f / 5.0f;
  p = p * square + 1.0f / 3.0f;
  // softplus(-x) + epsilon x without a difference, which would be NaN for minus infinity, as 0 times infinity is
  const float weight = x < 0.0f ? 1.0f - epsilon : epsilon;
  return 2.0f * (u + u * square * p) + (weight == 0.0f ? 0.0f : weight * size);
}

template <bool CONTRASTIVE>
DPH_INLINE Sums pairs(const Part& part, const float* __restrict chosen, const float* __restrict rejected, int64_t size,
                      float* __restrict chosen_slope, float* __restrict rejected_slope) {
  float loss = 0, right = 0, margins = 0, first = 0, second = 0;
  const float epsilon = part.epsilon, scale = part.scale;
#pragma omp simd reduction(+ : loss, right, margins, first, second)
  for (int64_t i = 0; i < size; ++i) {
    const float margin = chosen[i] - rejected[i];
    float slope, other;
    if (CONTRASTIVE) {
      loss += smoothed(margin, epsilon, slope);
      other = slope;
    } else {
      loss += smoothed(chosen[i], epsilon, slope);
      loss += smoothed(-rejected[i], epsilon, other);
    }
    chosen_slope[i] = scale * slope;
    rejected_slope[i] = -(scale * other);
    right += margin != margin ? margin : (margin > 0.0f ? 1.0f : 0.0f);
    margins += margin;
    first += chosen[i];
    second += rejected[i];
  }
  return {loss, right, margins, first, second};
}

float value(const PreferenceInput& input, int64_t at) {
  return input.bf16 ? float_from_bf16(static_cast<const uint16_t*>(input.data)[at])
                    : static_cast<const float*>(input.data)[at];
}

// Returns the values in place if they are contiguous fp32, else copied to ``room`` as fp32.
const float* gather(const PreferenceInput& input, int64_t begin, int64_t size, int64_t head, float* room) {
  const int64_t start = begin * input.row + head * input.head;
  if (!input.bf16 && input.row == 1) return static_cast<const float*>(input.data) + start;
  for (int64_t i = 0; i < size; ++i) room[i] = value(input, start + i * input.row);
  return room;
}

void scatter(const float* slopes, int64_t begin, int64_t size, int64_t head, int64_t heads, float* target) {
  for (int64_t i = 0; i < size; ++i) target[(begin + i) * heads + head] = slopes[i];
}

DPH_INLINE void block(const Part& part, const float* chosen, const float* rejected, int64_t size, float* chosen_slope,
                      float* rejected_slope, Sums& sums) {
  sums.add(part.contrastive ? pairs<true>(part, chosen, rejected, size, chosen_slope, rejected_slope)
                            : pairs<false>(part, chosen, rejected, size, chosen_slope, rejected_slope));
}

#define DPH_BLOCK(name)                                                                                          \
  void name(const Part& part, const float* chosen, const float* rejected, int64_t size, float* chosen_slope,     \
            float* rejected_slope, Sums& sums) {                                                                 \
    block(part, chosen, rejected, size, chosen_slope, rejected_slope, sums);                                     \
  }
DPH_BLOCK(baseline)
#ifdef DPH_X86
DPH_AVX2 DPH_BLOCK(avx2)
DPH_AVX512 DPH_BLOCK(avx512)
#endif
#undef DPH_BLOCK

using Block = decltype(&baseline);

Block pick() {
#ifdef DPH_X86
  if (vector_floats() == 16) return avx512;
  if (vector_floats() == 8) return avx2;
#endif
  return baseline;
}

const Block wide_block = pick();

DPH_INLINE void subtract(const float* x, const float* y, float factor, int64_t size, float* result) {
  for (int64_t i = 0; i < size; ++i) result[i] = factor * (x[i] - y[i]);
}

Sums group(const Part& part, int64_t begin, int64_t end, int64_t head) {
  float room[4][BLOCK], slopes[2][BLOCK];
  Sums sums;
  for (; begin < end; begin += BLOCK) {
    const int64_t size = std::min(BLOCK, end - begin);
    const float* values[4];
    for (int i = 0; i < (part.implicit ? 4 : 2); ++i) values[i] = gather(part.inputs[i], begin, size, head, room[i]);
    if (part.implicit) {
      for (int i = 0; i < 2; ++i) {
        subtract(values[i], values[i + 2], part.beta, size, room[i]);
        values[i] = room[i];
      }
    }
    const bool dense = part.heads == 1;
    float* const chosen = dense ? part.chosen + begin : slopes[0];
    float* const rejected = dense ? part.rejected + begin : slopes[1];
    (part.wide ? wide_block : baseline)(part, values[0], values[1], size, chosen, rejected, sums);
    if (!dense) {
      scatter(slopes[0], begin, size, head, part.heads, part.chosen);
      scatter(slopes[1], begin, size, head, part.heads, part.rejected);
    }
  }
  return sums;
}

// Sums of one head over all pairs.
Sums total(const Part& part, int64_t pairs, int64_t head, int threads) {
  const int64_t groups = (pairs + GROUP - 1) / GROUP;
  if (groups == 1) return group(part, 0, pairs, head);
  std::vector<Sums> found(groups);
#pragma omp parallel for schedule(static) num_threads(threads) if (groups >= LEAST)
  for (int64_t i = 0; i < groups; ++i) found[i] = group(part, i * GROUP, std::min((i + 1) * GROUP, pairs), head);
  Sums sums;
  for (const Sums& one : found) sums.add(one);
  return sums;
}

// Writes the means in the order of HEAD_METRICS and returns the mean loss.
double describe(const Sums& sums, double count, float* loss, float* summary) {
  *loss = static_cast<float>(sums.loss / count);
  summary[0] = static_cast<float>(sums.right / count);
  summary[1] = static_cast<float>(sums.margin / count);
  summary[2] = static_cast<float>(sums.chosen / count);
  summary[3] = static_cast<float>(sums.rejected / count);
  return sums.loss / count;
}

}  // namespace

void preference_loss_cpu(const PreferenceArguments& a, int threads) {
  const double pairs = static_cast<double>(a.pairs), judgements = pairs * static_cast<double>(a.heads);
  float* metrics = a.metrics;
  std::fill(metrics, metrics + PREFERENCE_METRICS, NAN);
  float* slopes = a.slopes;
  const bool wide = a.pairs * ((a.rewards ? a.heads : 0) + (a.logprobs ? 1 : 0)) >= WIDE;
  double loss = 0;
  if (a.rewards) {
    const int64_t count = a.pairs * a.heads;
    const Part part{a.rewards, a.heads, false, 0.0f, a.dph_epsilon, a.contrastive, wide,
                    static_cast<float>(a.dph_weight / judgements), slopes, slopes + count};
    slopes += 2 * count;
    Sums all;
    for (int64_t head = 0; head < a.heads; ++head) {
      const Sums sums = total(part, a.pairs, head, threads);
      all.add(sums);
      float* const own = metrics + PREFERENCE_METRICS + head * PREFERENCE_HEAD_METRICS;
      if (a.heads > 1) describe(sums, pairs, own, own + 1);
    }
    loss += a.dph_weight * describe(all, judgements, metrics + 1, metrics + 3);
  }
  if (a.logprobs) {
    const Part part{a.logprobs, 1, true, a.beta, a.dpo_epsilon, true, wide,
                    static_cast<float>(static_cast<double>(a.dpo_weight) * a.beta / pairs), slopes, slopes + a.pairs};
    loss += a.dpo_weight * describe(total(part, a.pairs, 0, threads), pairs, metrics + 2, metrics + 7);
  }
  *a.loss = metrics[0] = static_cast<float>(loss);
  metrics[11] = isfinite(*a.loss) ? 1.0f : 0.0f;
}

void preference_loss_gradients_cpu(const float* slopes, float grad, const PreferenceGradient* gradients, int64_t count,
                                   int threads) {
  for (const PreferenceGradient* own = gradients; own < gradients + count; slopes += own->size, ++own) {
    const int64_t groups = (own->size + GROUP - 1) / GROUP;
    const auto scale = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) own->data[i] = grad * slopes[i];
    };
    if (groups < LEAST) {
      scale(0, own->size);
      continue;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < groups; ++i) scale(i * GROUP, std::min((i + 1) * GROUP, own->size));
  }
}

}  // namespace dph
