// Transposition of W vectors of W floats for one instruction set. The kernels of an operator include this file in the
// namespace of the instruction set, after defining W, Vec and DPH_FN; hence there is no include guard.

#if defined(__clang__)  // has no __builtin_shuffle
using Lanes = std::make_integer_sequence<int, DPH_LANES>;

template <int FIRST, int... L>
DPH_FN Vec interleave(Vec a, Vec b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (FIRST + L / 2 + L % 2 * DPH_LANES)...);
}
#endif

// Transposes W vectors: each round interleaves the two halves.
DPH_FN void turn(Vec* v) {
#if !defined(__clang__)
  typedef int32_t Places __attribute__((vector_size(4 * DPH_LANES)));
  Places low, high;
#pragma GCC unroll 16
  for (int l = 0; l < W; ++l) {
    low[l] = l / 2 + l % 2 * W;
    high[l] = low[l] + W / 2;
  }
#endif
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Vec u[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
#if defined(__clang__)
      u[2 * i] = interleave<0>(v[i], v[i + W / 2], Lanes());
      u[2 * i + 1] = interleave<W / 2>(v[i], v[i + W / 2], Lanes());
#else
      u[2 * i] = __builtin_shuffle(v[i], v[i + W / 2], low);
      u[2 * i + 1] = __builtin_shuffle(v[i], v[i + W / 2], high);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = u[i];
  }
}
