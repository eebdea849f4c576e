// Sum over the lanes of a vector of W floats for one instruction set. The kernels of an operator include this file in the
// namespace of the instruction set, after defining W, Vec and DPH_FN; hence there is no include guard.

// Sum over the lanes, by successive halves.
DPH_FN float sum(Vec x) {
  typedef float Half __attribute__((vector_size(2 * DPH_LANES)));
  typedef float Quarter __attribute__((vector_size(DPH_LANES)));
  Half halves[2];
  Quarter quarters[2];
  memcpy(halves, &x, sizeof x);
  const Half half = halves[0] + halves[1];
  memcpy(quarters, &half, sizeof half);
  const Quarter quarter = quarters[0] + quarters[1];
  float result = quarter[0];
  for (int64_t l = 1; l < W / 4; ++l) result += quarter[l];
  return result;
}
