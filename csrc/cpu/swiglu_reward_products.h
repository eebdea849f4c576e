// Matrix products of the pooler for one instruction set. swiglu_reward_kernels.h includes this file in the namespace of
// the instruction set; hence there is no include guard. The right factor is stored in panels; the left factor is a
// weight matrix in its original layout, or panels too.

// Left factor [.., depth] of a product.
struct Left {
  const void* data;
  int64_t row, column;  // strides of the matrix
  bool bf16;
  Panels panels;  // used if data is null; its features are the rows of the factor
};

// Distance of packed tiles of MR rows, in elements: not a power of two, which would map them to few cache sets.
constexpr int64_t tile_step(int64_t depth) { return MR * depth + 16; }

// Row r of packed tiles that are not transposed.
DPH_FN float* packed_row(float* packed, int64_t r, int64_t depth) {
  return packed + r / MR * tile_step(depth) + r % MR * depth;
}

// Packs rows [i, i + count) of the left factor at depths [k, k + depth) as float, zero-padded to whole tiles. In a
// tile, element (r, d) is at r * depth + d, or at d * MR + r if ``turned`` (transposed).
template <class Element>
DPH_FN void pack_matrix(float* to, const Left& a, int64_t i, int64_t count, int64_t k, int64_t depth, bool turned) {
  const Element* from = static_cast<const Element*>(a.data) + i * a.row + k * a.column;
  if (!turned) {
    for (int64_t r = 0; r < count; ++r) {
      float* row = packed_row(to, r, depth);
      for (int64_t d = 0; d < depth; ++d) row[d] = value(from[r * a.row + d]);
    }
    return;
  }
  for (int64_t d = 0; d < depth; ++d, from += a.column) {
    float* place = to + d * MR;
    if (count % MR == 0 && a.row == 1) {  // whole cache lines
      for (int64_t r = 0; r < count; r += 16) __builtin_prefetch(from + 8 * a.column + r);
      for (int64_t r = 0; r < count; r += MR, place += tile_step(depth)) {
        for (int64_t t = 0; t < MR; ++t) place[t] = value(from[r + t]);
      }
    } else {
      for (int64_t r = 0; r < count; r += MR, place += tile_step(depth)) {
        for (int64_t t = 0; t < MR; ++t) place[t] = r + t < count ? value(from[(r + t) * a.row]) : 0.0f;
      }
    }
  }
}

DPH_FN void pack(float* to, const Left& a, int64_t i, int64_t count, int64_t k, int64_t depth, bool turned) {
  if (a.data && a.bf16) {
    pack_matrix<uint16_t>(to, a, i, count, k, depth, turned);
  } else if (a.data) {
    pack_matrix<float>(to, a, i, count, k, depth, turned);
  } else {
    for (int64_t r = 0; r < count; ++r) {
      float* row = packed_row(to, r, depth);
      for (int64_t d = 0; d < depth; d += PANEL) {
        memcpy(row + d, a.panels.row(i + r, k + d), std::min(PANEL, depth - d) * sizeof(float));
      }
    }
  }
  if (!turned && count % MR) {
    memset(packed_row(to, count, depth), 0, (MR - count % MR) * depth * sizeof(float));
  }
}

// C [MR, NV vectors] = A B, or += A B. Element (r, k) of A is at A[r * rs + k * cs]; ldb and ldc are the row strides of
// B and C. The product is accumulated from zero and then added to C, which limits the rounding error of long sums.
template <int NV>
DPH_FN void micro(int64_t depth, const float* A, int64_t rs, int64_t cs, const float* B, int64_t ldb, float* C,
                  int64_t ldc, int64_t count, bool add) {
  Vec acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) acc[r][n] = Vec{};
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[NV];
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) b[n] = load(B + k * ldb + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const Vec a = A[r * rs + k * cs] - Vec{};
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) acc[r][n] += a * b[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    if (r >= count) break;
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) {
      float* c = C + r * ldc + n * W;
      store(c, add ? load(c) + acc[r][n] : acc[r][n]);
    }
  }
}

// One tile of rows times one panel; the reduction is over ``depth`` features of the panel.
DPH_FN void multiply_tile(float* out, int64_t ld, const float* A, int64_t rs, bool turned, int64_t count, const float* B,
                          int64_t width, int64_t depth, bool add) {
  for (int64_t n = 0; n < width;) {
    const bool two = n + 2 * W <= width;
    if (turned && two) {
      micro<2>(depth, A, 1, MR, B + n, width, out + n, ld, count, add);
    } else if (turned) {
      micro<1>(depth, A, 1, MR, B + n, width, out + n, ld, count, add);
    } else if (two) {
      micro<2>(depth, A, rs, 1, B + n, width, out + n, ld, count, add);
    } else {
      micro<1>(depth, A, rs, 1, B + n, width, out + n, ld, count, add);
    }
    n += two ? 2 * W : W;
  }
}

// out [count, end - begin] = rows [first, first + count) of the left factor times columns [begin, end) of the right.
DPH_TARGET static void product(float* out, int64_t ld, const Left& a, int64_t first, int64_t count, const Panels& b,
                               int64_t begin, int64_t end, float* packed) {
  const bool turned = a.data && a.column != 1;
  const int64_t direct = a.data && !turned && !a.bf16 ? count / MR * MR : 0;  // rows that need no packing
  for (int64_t i = 0; b.features == 0 && i < count; ++i) memset(out + i * ld, 0, (end - begin) * sizeof(float));
  for (int64_t k = 0; k < b.features; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, b.features - k);
    if (direct < count) pack(packed, a, first + direct, count - direct, k, depth, turned);
    for (int64_t j = begin; j < end; j += PANEL) {
      for (int64_t i = 0; i < count; i += MR) {
        const bool lies = i < direct;
        const float* A = lies ? static_cast<const float*>(a.data) + (first + i) * a.row + k
                              : packed + (i - direct) / MR * tile_step(depth);
        float* C = out + i * ld + j - begin;
        multiply_tile(C, ld, A, lies ? a.row : depth, turned, std::min(MR, count - i), b.row(k, j), b.width(j), depth, k > 0);
      }
    }
  }
}
