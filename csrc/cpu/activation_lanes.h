// Activations for one vector width. No include guard: included after lanes.h.

EEFAST_INLINE Floats splat(float x) {
#if defined(EEFAST_X86) && EEFAST_LANES == 16
  return (Floats)_mm512_set1_ps(x);
#elif defined(EEFAST_X86) && EEFAST_LANES == 8
  return (Floats)_mm256_set1_ps(x);
#else
  Floats v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = x;
  return v;
#endif
}

#ifdef EEFAST_BFLOAT16
EEFAST_INLINE void store(BFloat16* x, Floats v) {
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(x, &narrow, sizeof(narrow));
}
#endif

EEFAST_INLINE Floats relu(Floats v) {
#if defined(EEFAST_X86) && EEFAST_LANES == 16
  // With the operands in this order NaN stays NaN.
  return (Floats)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v);
#elif defined(EEFAST_X86) && EEFAST_LANES == 8
  return (Floats)_mm256_max_ps(_mm256_setzero_ps(), (__m256)v);
#else
  return (Floats)((Words)v & ~(Words)(v < 0.0f));
#endif
}

// NaN stays NaN, as above.
EEFAST_INLINE Floats clamp(Floats v, float low, float high) {
#if defined(EEFAST_X86) && EEFAST_LANES == 16
  return (Floats)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)v));
#elif defined(EEFAST_X86) && EEFAST_LANES == 8
  return (Floats)_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), (__m256)v));
#else
  const Words below = (Words)(v < low), above = (Words)(v > high);
  return (Floats)(((Words)v & ~(below | above)) | (below & (Words)splat(low)) | (above & (Words)splat(high)));
#endif
}

// e^x as exp_lanes, of any x: at least e^-87, ∞ from 88.4 on.
EEFAST_INLINE Floats exponential(Floats x) { return exp_between(clamp(x, -87.0f, 89.0f)); }

// x/2 · (1 + erf(x/√2)); the error of erf is 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26).
EEFAST_INLINE Floats gelu(Floats x) {
  const Floats z = (Floats)((Words)x & 0x7fffffffu) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
  Floats p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Floats tail = p * t * exponential(-z * z);  // 1 - erf(z)
  const Words negative = (Words)(x < 0.0f);
  const Floats twice = (Floats)(((Words)tail & negative) | ((Words)(2.0f - tail) & ~negative));
  return 0.5f * x * twice;
}

template <Activation activation>
EEFAST_INLINE Floats activated(Floats x) {
  switch (activation) {
    case Activation::relu6: return clamp(x, 0.0f, 6.0f);
    case Activation::silu: return x / (1.0f + exponential(-x));
    case Activation::hardswish: return x * (clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f));
    case Activation::hardsigmoid: return clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
    case Activation::sigmoid: return 1.0f / (1.0f + exponential(-x));
    case Activation::gelu: return gelu(x);
    default: return x;
  }
}

template <Activation activation, class E>
EEFAST_INLINE void activate_all(E* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, activated<activation>(load(x + i)));
}

// A row of finished pixels, n numbers side by side.
template <class E>
EEFAST_TARGET static __attribute__((noinline)) void activate(Activation activation, E* x, int64_t n) {
  switch (activation) {
    case Activation::relu6: return activate_all<Activation::relu6>(x, n);
    case Activation::silu: return activate_all<Activation::silu>(x, n);
    case Activation::hardswish: return activate_all<Activation::hardswish>(x, n);
    case Activation::hardsigmoid: return activate_all<Activation::hardsigmoid>(x, n);
    case Activation::sigmoid: return activate_all<Activation::sigmoid>(x, n);
    case Activation::gelu: return activate_all<Activation::gelu>(x, n);
    default: return;
  }
}
