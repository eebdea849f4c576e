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

// PR: rows of a packed tile.

// Distance of packed tiles, in elements: not a power of two, which would map them to few cache sets.
template <int64_t PR>
constexpr int64_t tile_step(int64_t depth) {
  return PR * depth + 16;
}

// Row r of packed tiles that are not transposed.
template <int64_t PR>
DPH_FN float* packed_row(float* packed, int64_t r, int64_t depth) {
  return packed + r / PR * tile_step<PR>(depth) + r % PR * depth;
}

// Packs rows [i, i + count) of the left factor at depths [k, k + depth) as float, zero-padded to whole tiles. In a
// tile, element (r, d) is at r * depth + d, or at d * PR + r if ``turned`` (transposed).
template <int64_t PR, class Element>
DPH_FN void pack_matrix(float* to, const Left& a, int64_t i, int64_t count, int64_t k, int64_t depth, bool turned) {
  const Element* from = static_cast<const Element*>(a.data) + i * a.row + k * a.column;
  if (!turned) {
    for (int64_t r = 0; r < count; ++r) {
      float* row = packed_row<PR>(to, r, depth);
      for (int64_t d = 0; d < depth; ++d) row[d] = value(from[r * a.row + d]);
    }
    return;
  }
  for (int64_t d = 0; d < depth; ++d, from += a.column) {
    float* place = to + d * PR;
    int64_t r = 0;
    if (a.row == 1) {  // whole cache lines
      for (int64_t ahead = 0; ahead < count; ahead += 16) __builtin_prefetch(from + 8 * a.column + ahead);
      for (; r + PR <= count; r += PR, place += tile_step<PR>(depth)) {
        if (sizeof(Element) == sizeof(float)) {
          memcpy(place, from + r, PR * sizeof(float));
        } else {
          for (int64_t t = 0; t < PR; ++t) place[t] = value(from[r + t]);
        }
      }
    }
    for (; r < count; r += PR, place += tile_step<PR>(depth)) {
      for (int64_t t = 0; t < PR; ++t) place[t] = r + t < count ? value(from[(r + t) * a.row]) : 0.0f;
    }
  }
}

template <int64_t PR>
DPH_FN void pack(float* to, const Left& a, int64_t i, int64_t count, int64_t k, int64_t depth, bool turned) {
  if (a.data && a.bf16) {
    pack_matrix<PR, uint16_t>(to, a, i, count, k, depth, turned);
  } else if (a.data) {
    pack_matrix<PR, float>(to, a, i, count, k, depth, turned);
  } else {
    for (int64_t r = 0; r < count; ++r) {
      float* row = packed_row<PR>(to, r, depth);
      for (int64_t d = 0; d < depth; d += PANEL) {
        memcpy(row + d, a.panels.row(i + r, k + d), std::min(PANEL, depth - d) * sizeof(float));
      }
    }
  }
  if (!turned && count % PR) {
    memset(packed_row<PR>(to, count, depth), 0, (PR - count % PR) * depth * sizeof(float));
  }
}

// C [M, NV vectors] = A B, or += A B. Element (r, k) of A is at A[r * rs + k * cs]; ldb and ldc are the row strides of
// B and C. The product is accumulated from zero and then added to C, which limits the rounding error of long sums.
template <int M, int NV>
DPH_FN void micro(int64_t depth, const float* A, int64_t rs, int64_t cs, const float* B, int64_t ldb, float* C,
                  int64_t ldc, int64_t count, bool add) {
  Vec acc[M][NV];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) acc[r][n] = Vec{};
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[NV];
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) b[n] = load(B + k * ldb + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const Vec a = A[r * rs + k * cs] - Vec{};
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) acc[r][n] += a * b[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    if (r >= count) break;
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) {
      float* c = C + r * ldc + n * W;
      store(c, add ? load(c) + acc[r][n] : acc[r][n]);
    }
  }
}

// One tile of rows times one panel; the reduction is over ``depth`` features of the panel.
template <int M>
DPH_FN void multiply_tile(float* out, int64_t ld, const float* A, int64_t rs, bool turned, int64_t count, const float* B,
                          int64_t width, int64_t depth, bool add) {
  for (int64_t n = 0; n < width;) {
    const bool two = n + 2 * W <= width;
    if (turned && two) {
      micro<M, 2>(depth, A, 1, M, B + n, width, out + n, ld, count, add);
    } else if (turned) {
      micro<M, 1>(depth, A, 1, M, B + n, width, out + n, ld, count, add);
    } else if (two) {
      micro<M, 2>(depth, A, rs, 1, B + n, width, out + n, ld, count, add);
    } else {
      micro<M, 1>(depth, A, rs, 1, B + n, width, out + n, ld, count, add);
    }
    n += two ? 2 * W : W;
  }
}

template <int64_t PR>
DPH_FN void product(float* out, int64_t ld, const Left& a, int64_t first, int64_t count, const Panels& b,
                               int64_t begin, int64_t end, float* packed) {
  const bool turned = a.data && a.column != 1;
  const int64_t direct = a.data && !turned && !a.bf16 ? count / MR * MR : 0;  // rows that need no packing
  for (int64_t i = 0; b.features == 0 && i < count; ++i) memset(out + i * ld, 0, (end - begin) * sizeof(float));
  for (int64_t k = 0; k < b.features; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, b.features - k);
    if (direct < count) pack<PR>(packed, a, first + direct, count - direct, k, depth, turned);
    for (int64_t j = begin; j < end; j += PANEL) {
      const float* B = b.row(k, j);
      const int64_t width = b.width(j);
      for (int64_t i = 0; i < direct;) {
        const float* A = static_cast<const float*>(a.data) + (first + i) * a.row + k;
        float* C = out + i * ld + j - begin;
        // Six rows fill the registers of the smaller sets better than four, but 32 is no multiple of six.
        if (MR == 4 && (direct - i == 6 || direct - i >= 10)) {
          multiply_tile<6>(C, ld, A, a.row, false, 6, B, width, depth, k > 0);
          i += 6;
        } else {
          multiply_tile<MR>(C, ld, A, a.row, false, MR, B, width, depth, k > 0);
          i += MR;
        }
      }
      for (int64_t i = direct; i < count; i += PR) {
        const float* A = packed + (i - direct) / PR * tile_step<PR>(depth);
        float* C = out + i * ld + j - begin;
        multiply_tile<PR>(C, ld, A, depth, turned, std::min(PR, count - i), B, width, depth, k > 0);
      }
    }
  }
}

// out [count, end - begin] = rows [first, first + count) of the left factor times columns [begin, end) of the right.
// With few columns it takes as long to pack the left factor as to multiply, and four rows are packed faster than six.
DPH_TARGET static void product(float* out, int64_t ld, const Left& a, int64_t first, int64_t count, const Panels& b,
                               int64_t begin, int64_t end, float* packed) {
  if (W == 16) {
    product<8>(out, ld, a, first, count, b, begin, end, packed);
  } else if (end - begin > 16) {
    product<6>(out, ld, a, first, count, b, begin, end, packed);
  } else {
    product<4>(out, ld, a, first, count, b, begin, end, packed);
  }
}
