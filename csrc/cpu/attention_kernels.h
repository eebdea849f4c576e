// Attention kernels for one instruction set. attention.cpp includes this file once per instruction set, each time in a
// separate namespace, with DPH_TARGET (function attribute) and DPH_LANES (vector width in floats) defined; hence there
// is no include guard.
//
// Vector lanes are queries: scores are K Q^T with keys as rows, so that keys and values are read in their original
// layout (their elements are broadcast) and softmax needs no reduction across lanes.

#define DPH_FN DPH_TARGET static inline __attribute__((always_inline))

constexpr int64_t W = DPH_LANES;
constexpr int64_t MR = 8;  // rows of a micro-tile; with two vectors 16 accumulators, which hides FMA latency
constexpr int64_t BM = ATTENTION_ROWS;
constexpr int64_t BN = ATTENTION_BLOCK;
static_assert(BM % (2 * W) == 0 && BN % MR == 0, "tiles are whole micro-tiles");

typedef float Vec __attribute__((vector_size(4 * DPH_LANES)));
typedef int32_t Int __attribute__((vector_size(4 * DPH_LANES)));
typedef float Loose __attribute__((vector_size(4 * DPH_LANES), aligned(4), may_alias));
typedef int32_t LooseInt __attribute__((vector_size(4 * DPH_LANES), aligned(4), may_alias));

DPH_FN Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
DPH_FN Int load(const int32_t* p) { return *reinterpret_cast<const LooseInt*>(p); }
DPH_FN void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
DPH_FN Vec splat(float x) { return x - Vec{}; }
DPH_FN Vec max(Vec a, Vec b) { return a > b ? a : b; }

#include "lane_sum.h"
#include "transpose.h"

// 2^x to 1e-7; 0 for results below 2^-125, NaN stays NaN. Inputs are at most about 0.
DPH_FN Vec exp2(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, stored in the low bits
  const Vec low = splat(-125.0f);
  const Vec clamped = x < low ? low : x;
  const Vec shifted = clamped + magic;
  const Vec f = clamped - (shifted - magic);  // in [-1/2, 1/2]
  Vec p = splat(1.535336150e-04f);               // minimax polynomial on [-1/2, 1/2]
  p = p * f + 1.339887499e-03f;
  p = p * f + 9.618437364e-03f;
  p = p * f + 5.550332470e-02f;
  p = p * f + 2.402264791e-01f;
  p = p * f + 6.931472029e-01f;
  p = p * f + 1.0f;
  const Int exponent = (reinterpret_cast<Int>(shifted) << 23) + 0x3f800000;
  return x < low ? Vec{} : p * reinterpret_cast<Vec>(exponent);  // a product keeps NaN, an exponent addition may not
}

enum class Into { Set, Add, Rescale };

// C [m, n] = A B, += A B, or = C diag(alpha) + A B. Element (i, k) of A is at A[i * rs + k * cs]; B is [depth, n] and C
// [m, n] with row strides ldb and ldc; m is a multiple of MR, n of W. The product has separate accumulators and is
// added to C at the end, so rounding errors grow with the number of blocks, not with the number of keys.
template <int NV, Into INTO>
DPH_FN void micro(int64_t depth, const float* A, int64_t rs, int64_t cs, const float* B, int64_t ldb, float* C,
                  int64_t ldc, const float* alpha) {
  Vec acc[MR][NV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[NV];
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) b[n] = load(B + k * ldb + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const Vec a = splat(A[r * rs + k * cs]);
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) acc[r][n] += a * b[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) {
      float* const place = C + r * ldc + n * W;
      if (INTO == Into::Add) acc[r][n] += load(place);
      if (INTO == Into::Rescale) acc[r][n] += load(place) * load(alpha + n * W);
      store(place, acc[r][n]);
    }
  }
}

template <Into INTO>
DPH_FN void multiply(int64_t m, int64_t n, int64_t depth, const float* A, int64_t rs, int64_t cs, const float* B,
                     int64_t ldb, float* C, int64_t ldc, const float* alpha = nullptr) {
  for (int64_t i = 0; i < m; i += MR) {
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) {
      micro<2, INTO>(depth, A + i * rs, rs, cs, B + j, ldb, C + i * ldc + j, ldc, alpha ? alpha + j : nullptr);
    }
    for (; j < n; j += W) {
      micro<1, INTO>(depth, A + i * rs, rs, cs, B + j, ldb, C + i * ldc + j, ldc, alpha ? alpha + j : nullptr);
    }
  }
}

DPH_FN void load_row(float* to, const AttentionRows& from, int64_t row, int64_t head, int64_t size, bool bf16) {
  const int64_t at = row * from.row + head * from.head;
  if (bf16) {
    const uint16_t* source = static_cast<const uint16_t*>(from.data) + at;
    for (int64_t d = 0; d < size; ++d) to[d] = float_from_bf16(source[d]);
  } else {
    memcpy(to, static_cast<const float*>(from.data) + at, size * sizeof(float));
  }
}

DPH_FN void store_row(const AttentionRows& to, int64_t row, int64_t head, const float* from, int64_t size, bool bf16) {
  const int64_t at = row * to.row + head * to.head;
  if (bf16) {
    uint16_t* target = static_cast<uint16_t*>(to.data) + at;
    for (int64_t d = 0; d < size; ++d) target[d] = bf16_from_float(from[d]);
  } else {
    memcpy(static_cast<float*>(to.data) + at, from, size * sizeof(float));
  }
}

DPH_FN void rotate_row(float* x, const float* cos, const float* sin, float sign, int64_t half) {
  for (int64_t d = 0; d < half; ++d) {
    const float first = x[d], second = x[d + half], s = sign * sin[d];
    x[d] = first * cos[d] - second * s;
    x[d + half] = second * cos[d] + first * s;
  }
}

// Copies keys or values [start, end) to contiguous float rows, zero-padded to whole micro-tiles.
DPH_FN void load_block(float* to, const AttentionArguments& a, const AttentionRows& memory, const AttentionRows& fresh,
                       int64_t start, int64_t end, int64_t head, int64_t width) {
  const AttentionRows& rows = start < a.memory ? memory : fresh;
  const int64_t base = start < a.memory ? 0 : a.memory;
  for (int64_t j = start; j < end; ++j) {
    float* row = to + (j - start) * width;
    load_row(row, rows, j - base, head, a.head_dim, a.bf16);
    for (int64_t d = a.head_dim; d < width; ++d) row[d] = 0.0f;
  }
  const int64_t filled = end - start, whole = (filled + MR - 1) / MR * MR;
  memset(to + filled * width, 0, (whole - filled) * width * sizeof(float));
}

// Transposes [rows, width] to [width, lanes], with zeros in the padding lanes; width and lanes are multiples of W.
DPH_FN void transpose(float* to, const float* from, int64_t rows, int64_t width, int64_t lanes) {
  for (int64_t i = 0; i < lanes; i += W) {
    for (int64_t d = 0; d < width; d += W) {
      Vec v[W];
#pragma GCC unroll 16
      for (int64_t l = 0; l < W; ++l) v[l] = i + l < rows ? load(from + (i + l) * width + d) : Vec{};
      turn(v);
#pragma GCC unroll 16
      for (int64_t l = 0; l < W; ++l) store(to + (d + l) * lanes + i, v[l]);
    }
  }
}

// One tile of queries: its sizes and the keys visible to each query. A row is one head of one query; the heads, of one
// group, are adjacent rows.
struct Tile {
  int64_t heads, key_head, rows, lanes;  // lanes: rows rounded up to whole vectors
  int32_t query[BM], head[BM];           // of each row
  const int32_t *runs, *first_masked, *last_run;
  bool thin;                         // few queries per segment: most lanes would be masked
  alignas(64) int32_t bound[4][BM];  // per lane; no keys are visible to padding lanes
};

// Opens a tile for heads from ``head`` on, as many of those before ``end`` as it has rows for.
DPH_FN void open_tile(Tile& t, const AttentionArguments& a, int64_t number, int64_t head, int64_t end) {
  const int32_t* tile = a.work.tiles + 6 * number;
  const int64_t queries = tile[1] - tile[0];
  t.heads = std::min(end - head, BM / queries);
  t.key_head = head / (a.heads / a.key_heads);
  t.rows = queries * t.heads;
  t.lanes = (t.rows + W - 1) / W * W;
  t.runs = a.work.runs + 2 * tile[2];
  t.first_masked = a.work.runs + 2 * tile[3];
  t.last_run = a.work.runs + 2 * tile[4];
  t.thin = queries < 3 * tile[5] && (tile[5] > 1 || t.rows < MR);
  for (int64_t i = 0, query = tile[0]; i < t.rows; ++query) {
    for (int64_t own = head; own < head + t.heads; ++own, ++i) t.query[i] = query, t.head[i] = own;
  }
  for (int64_t c = 0; c < 4; ++c) {
    for (int64_t i = 0; i < t.lanes; ++i) t.bound[c][i] = i < t.rows ? a.work.bounds[4 * t.query[i] + c] : 0;
  }
}

// Sets elements of N matrices [keys, lanes] to ``hidden`` if the key is not visible to the query.
template <int N>
DPH_FN void mask(float* const (&matrices)[N], float hidden, const Tile& t, int64_t start, int64_t end) {
  for (int64_t i = 0; i < t.lanes; i += W) {
    const Int own = load(t.bound[0] + i), own_end = load(t.bound[1] + i);
    const Int prefix = load(t.bound[2] + i), prefix_end = load(t.bound[3] + i);
    for (int64_t key = start; key < end; ++key) {
      const Int j = static_cast<int32_t>(key) - Int{};
      const Int seen = ((own <= j) & (j < own_end)) | ((prefix <= j) & (j < prefix_end));
      for (float* values : matrices) {
        float* place = values + (key - start) * t.lanes + i;
        store(place, seen ? load(place) : splat(hidden));
      }
    }
  }
}

DPH_FN bool sees(const Tile& t, int64_t i, int64_t key) {
  return (t.bound[0][i] <= key && key < t.bound[1][i]) || (t.bound[2][i] <= key && key < t.bound[3][i]);
}

// Rows of a block with an element that is not finite. A product of the whole block would multiply it by the zeros of
// hidden pairs, which is NaN; these rows are zero there, and added for the pairs that see each other.
struct RowsApart {
  int64_t count = 0, numbers[BM > BN ? BM : BN];
};

// Whether all of ``count`` numbers, whole vectors, are finite: zero times any other is NaN.
DPH_FN bool finite(const float* x, int64_t count) {
  Vec zeros = {};
  for (int64_t i = 0; i < count; i += W) zeros += load(x + i) * 0.0f;
  return sum(zeros) == 0.0f;
}

// Sets such rows of ``rows`` to zero, and copies them to ``copy`` unless that is null.
DPH_FN void set_apart(RowsApart& apart, float* rows, float* copy, int64_t count, int64_t width) {
  apart.count = 0;
  if (finite(rows, count * width)) return;
  for (int64_t j = 0; j < count; ++j) {
    float* row = rows + j * width;
    if (finite(row, width)) continue;
    if (copy) memcpy(copy + j * width, row, width * sizeof(float));
    memset(row, 0, width * sizeof(float));
    apart.numbers[apart.count++] = j;
  }
}

// C [width, lanes] += A^T B of the rows of A [keys, width] that are set apart, with B [keys, lanes].
DPH_FN void add_keys_apart(const RowsApart& apart, const Tile& t, int64_t start, const float* A, const float* B,
                           float* C, int64_t size, int64_t width) {
  for (int64_t n = 0; n < apart.count; ++n) {
    const int64_t j = apart.numbers[n];
    for (int64_t i = 0; i < t.rows; ++i) {
      if (!sees(t, i, start + j)) continue;
      for (int64_t d = 0; d < size; ++d) C[d * t.lanes + i] += A[j * width + d] * B[j * t.lanes + i];
    }
  }
}

// C [keys, width] += factor A B^T of the queries that are set apart, with A [keys, lanes] and B [width, lanes].
DPH_FN void add_queries_apart(const RowsApart& apart, const Tile& t, int64_t start, int64_t count, const float* A,
                              const float* B, float factor, float* C, int64_t size, int64_t width) {
  for (int64_t n = 0; n < apart.count; ++n) {
    const int64_t i = apart.numbers[n];
    for (int64_t j = 0; j < count; ++j) {
      if (!sees(t, i, start + j)) continue;
      for (int64_t d = 0; d < size; ++d) C[j * width + d] += A[j * t.lanes + i] * (factor * B[d * t.lanes + i]);
    }
  }
}

// Head dimension rounded up to whole vectors and micro-tiles of every instruction set.
constexpr int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Scratch buffers of the forward pass of one tile.
struct Buffers {
  float *rows, *queries, *keys, *values, *out, *out_rows, *scores, *peak, *total, *decay;

  static int64_t floats(int64_t width) { return (4 * BM + 2 * BN) * width + BN * BM + 3 * BM; }

  Buffers(float* at, int64_t width) {
    auto take = [&at](int64_t size) { return (at += size) - size; };
    rows = take(BM * width);     // [rows, width], rotated and scaled queries
    queries = take(BM * width);  // [width, lanes], the transpose of rows
    keys = take(BN * width);
    values = take(BN * width);
    out = take(BM * width);
    out_rows = take(BM * width);
    scores = take(BN * BM);
    peak = take(BM);   // maximum score so far
    total = take(BM);  // sum of exponentials relative to the maximum
    decay = take(BM);
  }
};

DPH_TARGET inline int64_t forward_floats(int64_t head_dim) { return Buffers::floats(padded(head_dim)); }

// Returns rows [start, end) of keys or values and their stride: the original rows if these are float and need no
// padding, else a float copy in ``buffer``.
DPH_FN const float* view_block(int64_t& stride, float* buffer, const AttentionArguments& a, const AttentionRows& memory,
                               const AttentionRows& fresh, int64_t start, int64_t end, int64_t head) {
  if (a.bf16 || a.head_dim != padded(a.head_dim)) {
    stride = padded(a.head_dim);
    load_block(buffer, a, memory, fresh, start, end, head, stride);
    return buffer;
  }
  const AttentionRows& rows = start < a.memory ? memory : fresh;
  stride = rows.row;
  const int64_t row = start < a.memory ? start : start - a.memory;
  return static_cast<const float*>(rows.data) + row * rows.row + head * rows.head;
}

// out = decay * out + scores values, for NV vectors of the head dimension. Even and odd keys have separate accumulators
// to hide latency, and both are added to out at the end, as in ``micro``.
template <int NV>
DPH_FN void add_values(float* out, float decay, const float* scores, const float* values, int64_t stride,
                       int64_t count) {
  Vec even[NV] = {}, odd[NV] = {};
  int64_t j = 0;
  for (; j + 2 <= count; j += 2) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      even[n] += scores[j] * load(values + j * stride + n * W);
      odd[n] += scores[j + 1] * load(values + (j + 1) * stride + n * W);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < NV; ++n) {
    if (j < count) even[n] += scores[j] * load(values + j * stride + n * W);
    store(out + n * W, load(out + n * W) * decay + (even[n] + odd[n]));
  }
}

// Attention of one query to ``count`` keys. Vector lanes are keys for the scores and head dimensions for the output,
// which is not yet divided by ``total``.
DPH_FN void attend_one(const float* query, const float* keys, int64_t key_stride, const float* values,
                       int64_t value_stride, int64_t count, int64_t width, float* scores, float* out, float& peak,
                       float& total) {
  const int64_t whole = (count + W - 1) / W * W;
  for (int64_t j = 0; j < count; ++j) {
    Vec product = {};
    for (int64_t d = 0; d < width; d += W) product += load(query + d) * load(keys + j * key_stride + d);
    scores[j] = sum(product);
  }
  for (int64_t j = count; j < whole; ++j) scores[j] = -INFINITY;
  Vec top = splat(peak);
  for (int64_t j = 0; j < whole; j += W) top = max(load(scores + j), top);
  float now = peak;
  for (int64_t l = 0; l < W; ++l) now = top[l] > now ? top[l] : now;
  const float zero = now == -INFINITY ? 0.0f : now, decay = exp2f(peak - zero);
  Vec sums = {};
  for (int64_t j = 0; j < whole; j += W) {
    const Vec p = exp2(load(scores + j) - zero);
    store(scores + j, p);
    sums += p;
  }
  total = total * decay + sum(sums);
  peak = now;
  int64_t d = 0;
  for (; d + 4 * W <= width; d += 4 * W) add_values<4>(out + d, decay, scores, values + d, value_stride, count);
  for (; d < width; d += W) add_values<1>(out + d, decay, scores, values + d, value_stride, count);
}

// Processes runs [run, last) whose keys are visible to few rows of the tile, so that most lanes of queries would be
// masked. ``out`` is [rows, width].
DPH_FN void forward_thin(const AttentionArguments& a, const Tile& t, const int32_t* run, const int32_t* last,
                         const float* queries, const Buffers& b) {
  const int64_t width = padded(a.head_dim);
  for (; run < last; run += 2) {
    for (int64_t start = run[0]; start < run[1]; start += BN) {
      const int64_t end = std::min<int64_t>(start + BN, run[1]);
      int64_t key_stride, value_stride;
      const float* keys = view_block(key_stride, b.keys, a, a.memory_k, a.k, start, end, t.key_head);
      const float* values = view_block(value_stride, b.values, a, a.memory_v, a.v, start, end, t.key_head);
      for (int64_t i = 0; i < t.rows; ++i) {
        for (int64_t part = 0; part < 4; part += 2) {
          const int64_t low = std::max<int64_t>(start, t.bound[part][i]) - start;
          const int64_t high = std::min<int64_t>(end, t.bound[part + 1][i]) - start;
          if (low >= high) continue;
          attend_one(queries + i * width, keys + low * key_stride, key_stride, values + low * value_stride,
                     value_stride, high - low, width, b.scores, b.out + i * width, b.peak[i], b.total[i]);
        }
      }
    }
  }
}

// Processes runs [run, last) with queries along the lanes. ``out`` is [width, lanes].
DPH_FN void forward_wide(const AttentionArguments& a, const Tile& t, const int32_t* run, const int32_t* last,
                         const float* queries, const Buffers& b) {
  const int64_t width = padded(a.head_dim), lanes = t.lanes;
  float *keys = b.keys, *values = b.values, *scores = b.scores;
  RowsApart apart;
  for (; run < last; run += 2) {
    const bool masked = run >= t.first_masked;
    for (int64_t start = run[0]; start < run[1]; start += BN) {
      const int64_t end = std::min<int64_t>(start + BN, run[1]), count = end - start;
      const int64_t whole = (count + MR - 1) / MR * MR;
      load_block(keys, a, a.memory_k, a.k, start, end, t.key_head, width);
      load_block(values, a, a.memory_v, a.v, start, end, t.key_head, width);
      multiply<Into::Set>(whole, lanes, a.head_dim, keys, width, 1, queries, lanes, scores, lanes);
      if (masked) {
        mask({scores}, -INFINITY, t, start, end);
        set_apart(apart, values, keys, count, width);
      }
      for (int64_t i = 0; i < lanes; i += W) {
        const Vec before = load(b.peak + i);
        Vec now = before, sums = {};
        for (int64_t j = 0; j < count; ++j) now = max(load(scores + j * lanes + i), now);
        const Vec zero = now == -INFINITY ? Vec{} : now;
        for (int64_t j = 0; j < count; ++j) {
          const Vec p = exp2(load(scores + j * lanes + i) - zero);
          store(scores + j * lanes + i, p);
          sums += p;
        }
        const Vec factor = exp2(before - zero);
        store(b.peak + i, now);
        store(b.decay + i, factor);
        store(b.total + i, load(b.total + i) * factor + sums);
      }
      multiply<Into::Rescale>(width, lanes, count, values, 1, width, scores, lanes, b.out, lanes, b.decay);
      if (masked) add_keys_apart(apart, t, start, keys, scores, b.out, a.head_dim, width);
    }
  }
}

// Computes out and lse of a tile for heads from ``head`` on, before ``end``; returns the first head that is left.
DPH_TARGET inline int64_t forward_tile(const AttentionArguments& a, int64_t number, int64_t head, int64_t end,
                                       float* workspace) {
  Tile t;
  open_tile(t, a, number, head, end);
  const int64_t width = padded(a.head_dim), half = a.head_dim / 2;
  Buffers b(workspace, width);
  const float scale = static_cast<float>(a.scale * 1.4426950408889634);  // log2(e), as exponentials are powers of two
  for (int64_t i = 0; i < t.rows; ++i) {
    float* row = b.rows + i * width;
    const int64_t query = t.query[i];
    load_row(row, a.q, query, t.head[i], a.head_dim, a.bf16);
    rotate_row(row, a.q_cos + query * half, a.q_sin + query * half, 1.0f, half);
    for (int64_t d = 0; d < a.head_dim; ++d) row[d] *= scale;
    for (int64_t d = a.head_dim; d < width; ++d) row[d] = 0.0f;
  }
  memset(b.out, 0, t.lanes * width * sizeof(float));
  for (int64_t i = 0; i < t.lanes; ++i) b.peak[i] = -INFINITY, b.total[i] = 0.0f;
  // Candidates of a prompt: queries along the lanes for the shared prompt, then the separate keys of each candidate.
  const int32_t* wide_end = !t.thin ? t.last_run : t.rows < MR ? t.runs : t.first_masked;
  float* out = b.out;
  if (wide_end > t.runs) {
    transpose(b.queries, b.rows, t.rows, width, t.lanes);
    forward_wide(a, t, t.runs, wide_end, b.queries, b);
    out = b.out_rows;
    transpose(out, b.out, width, t.lanes, width);
  }
  b.out = out;
  forward_thin(a, t, wide_end, t.last_run, b.rows, b);
  for (int64_t i = 0; i < t.rows; ++i) {
    // A total of 0 of a row that sees keys: all scores are minus infinity, and the softmax is NaN.
    const bool blind = t.bound[0][i] >= t.bound[1][i] && t.bound[2][i] >= t.bound[3][i];
    const float total = b.total[i] == 0.0f ? NAN : b.total[i], inverse = 1.0f / total;
    float* row = b.out + i * width;
    for (int64_t d = 0; d < a.head_dim; ++d) row[d] = blind ? 0.0f : row[d] * inverse;
    store_row(a.out, t.query[i], t.head[i], row, a.head_dim, a.bf16);
    a.lse[t.query[i] * a.heads + t.head[i]] = blind ? -INFINITY : b.peak[i] + log2f(total);
  }
  return head + t.heads;
}

DPH_TARGET inline int64_t backward_floats(int64_t head_dim) {
  return (5 * BM + 3 * BN) * padded(head_dim) + 2 * BN * BM + 2 * BM;
}

DPH_FN void add_rows(const AttentionRows& to, int64_t first, int64_t head, const float* from, int64_t rows,
                     int64_t size, int64_t width) {
  for (int64_t j = 0; j < rows; ++j) {
    float* __restrict target = static_cast<float*>(to.data) + (first + j) * to.row + head * to.head;
    const float* __restrict source = from + j * width;
    for (int64_t d = 0; d < size; ++d) target[d] += source[d];
  }
}

// Computes dq of a tile for heads from ``head`` on, before ``end``, and adds the contributions of its queries to dk and
// dv, head ``slot``, of the new keys visible to them; returns the first head that is left.
DPH_TARGET inline int64_t backward_tile(const AttentionArguments& a, int64_t number, int64_t head, int64_t end,
                                        int64_t slot, float* workspace) {
  Tile t;
  open_tile(t, a, number, head, end);
  const int64_t width = padded(a.head_dim), half = a.head_dim / 2, lanes = t.lanes;
  const float scale = static_cast<float>(a.scale * 1.4426950408889634);
  float* query = workspace;                 // [rows, width], scaled, for dk
  float* query_lanes = query + BM * width;  // [width, lanes], scaled for base 2
  float* grad = query_lanes + BM * width;
  float* grad_lanes = grad + BM * width;
  float* dq = grad_lanes + BM * width;  // [width, lanes]
  float* keys = dq + BM * width;
  float* values = keys + BN * width;
  float* sums = values + BN * width;  // contribution to dk or dv
  float* p = sums + BN * width;       // [keys, lanes]
  float* ds = p + BN * BM;
  float *out = dq, *out_lanes = keys;  // their memory is used later, from the loop over keys on
  static_assert(BM <= BN, "keys has room for out_lanes");
  float* lse = ds + BN * BM;
  float* delta = lse + BM;
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = t.query[i], own = t.head[i];
    load_row(query + i * width, a.q, row, own, a.head_dim, a.bf16);
    rotate_row(query + i * width, a.q_cos + row * half, a.q_sin + row * half, 1.0f, half);
    for (int64_t d = 0; d < a.head_dim; ++d) query[i * width + d] *= scale;
    load_row(grad + i * width, a.grad, row, own, a.head_dim, a.bf16);
    load_row(out + i * width, a.out, row, own, a.head_dim, a.bf16);
    for (int64_t d = a.head_dim; d < width; ++d) {
      query[i * width + d] = grad[i * width + d] = out[i * width + d] = 0.0f;
    }
    const float kept = a.lse[row * a.heads + own];
    lse[i] = kept == -INFINITY ? INFINITY : kept;  // p = 0 for a query without keys
  }
  for (int64_t i = t.rows; i < lanes; ++i) lse[i] = INFINITY;  // p = 0 for the padding lanes, too
  transpose(query_lanes, query, t.rows, width, lanes);  // reproduces the forward pass's scores exactly
  constexpr float ln_2 = 0.6931471805599453f;
  for (int64_t i = 0; i < t.rows * width; ++i) query[i] *= ln_2;
  transpose(grad_lanes, grad, t.rows, width, lanes);
  transpose(out_lanes, out, t.rows, width, lanes);
  // In the order of ``micro``, so that dp - delta is exactly 0 if one key has the probability 1.
  for (int64_t i = 0; i < lanes; i += W) {
    Vec products = {};
    for (int64_t d = 0; d < a.head_dim; ++d) {
      products += load(out_lanes + d * lanes + i) * load(grad_lanes + d * lanes + i);
    }
    store(delta + i, products);
  }
  RowsApart keys_apart, queries_apart, grads_apart;
  set_apart(queries_apart, query, nullptr, t.rows, width);
  set_apart(grads_apart, grad, nullptr, t.rows, width);
  memset(dq, 0, width * lanes * sizeof(float));
  for (const int32_t* run = t.runs; run < t.last_run; run += 2) {
    const bool masked = run >= t.first_masked;
    for (int64_t start = run[0]; start < run[1]; start += BN) {
      const int64_t end = std::min<int64_t>(start + BN, run[1]), count = end - start;
      const int64_t whole = (count + MR - 1) / MR * MR;
      load_block(keys, a, a.memory_k, a.k, start, end, t.key_head, width);
      load_block(values, a, a.memory_v, a.v, start, end, t.key_head, width);
      multiply<Into::Set>(whole, lanes, a.head_dim, keys, width, 1, query_lanes, lanes, p, lanes);
      multiply<Into::Set>(whole, lanes, a.head_dim, values, width, 1, grad_lanes, lanes, ds, lanes);
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = 0; i < lanes; i += W) {
          const Vec power = load(p + j * lanes + i) - load(lse + i);
          const Vec probability = exp2(power > 0.0f ? Vec{} : power);  // above 0 by rounding of a large score only
          store(p + j * lanes + i, probability);
          store(ds + j * lanes + i, probability * (load(ds + j * lanes + i) - load(delta + i)));
        }
      }
      // After the products, in which NaN and infinities reach the hidden pairs, too.
      if (masked) {
        mask({p, ds}, 0.0f, t, start, end);
        set_apart(keys_apart, keys, values, count, width);
      }
      multiply<Into::Add>(width, lanes, count, keys, 1, width, ds, lanes, dq, lanes);
      if (masked) add_keys_apart(keys_apart, t, start, values, ds, dq, a.head_dim, width);
      if (start < a.memory) continue;  // memory is detached
      memset(p + count * lanes, 0, (whole - count) * lanes * sizeof(float));
      memset(ds + count * lanes, 0, (whole - count) * lanes * sizeof(float));
      multiply<Into::Set>(whole, width, t.rows, p, lanes, 1, grad, width, sums, width);
      add_queries_apart(grads_apart, t, start, count, p, grad_lanes, 1.0f, sums, a.head_dim, width);
      add_rows(a.dv, start - a.memory, slot, sums, count, a.head_dim, width);
      multiply<Into::Set>(whole, width, t.rows, ds, lanes, 1, query, width, sums, width);
      add_queries_apart(queries_apart, t, start, count, ds, query_lanes, ln_2, sums, a.head_dim, width);
      add_rows(a.dk, start - a.memory, slot, sums, count, a.head_dim, width);
    }
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    float* row = query + i * width;
    for (int64_t d = 0; d < a.head_dim; ++d) row[d] = dq[d * lanes + i] * static_cast<float>(a.scale);
    rotate_row(row, a.q_cos + t.query[i] * half, a.q_sin + t.query[i] * half, -1.0f, half);
    store_row(a.dq, t.query[i], t.head[i], row, a.head_dim, a.bf16);
  }
  return head + t.heads;
}

DPH_TARGET inline void rotate_rows(const RotateArguments& a, int64_t row, float* workspace) {
  const int64_t half = a.head_dim / 2;
  for (int64_t head = 0; head < a.heads; ++head) {
    load_row(workspace, a.in, row, head, a.head_dim, a.in_bf16);
    rotate_row(workspace, a.cos + row * half, a.sin + row * half, a.sign, half);
    store_row(a.out, row, head, workspace, a.head_dim, a.out_bf16);
  }
}

#undef DPH_FN
