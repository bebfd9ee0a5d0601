// Vectors of one width: loads, stores and sums of lanes. No include guard: included once per instruction set, inside a
// namespace, with EEFAST_LANES floats per vector and EEFAST_TARGET as the attribute that admits the instructions.

// Compilers keep an array in registers only if its loops are gone by the time they choose.
#define EEFAST_UNROLL _Pragma("GCC unroll 16")
#define EEFAST_UNROLL_ALL _Pragma("GCC unroll 64")
#define EEFAST_INLINE EEFAST_TARGET static inline __attribute__((always_inline))

constexpr int64_t kLanes = EEFAST_LANES;
template <int64_t n>
struct FloatVector {
  typedef float type __attribute__((vector_size(4 * n)));
};
using Floats = FloatVector<kLanes>::type;
using Quad = FloatVector<4>::type;
typedef uint32_t Words __attribute__((vector_size(4 * EEFAST_LANES)));

EEFAST_INLINE int64_t pad(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

EEFAST_INLINE Floats load(const float* x) {
  Floats v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

// A loop, which compilers turn into one instruction; __builtin_convertvector becomes four in GCC 12.
EEFAST_INLINE Words load_words(const void* x) {
  uint16_t shorts[kLanes];
  uint32_t words[kLanes];
  std::memcpy(shorts, x, sizeof(shorts));
  for (int64_t i = 0; i < kLanes; ++i) words[i] = shorts[i];
  Words v;
  std::memcpy(&v, words, sizeof(v));
  return v;
}

EEFAST_INLINE Floats load(const BFloat16* x) { return (Floats)(load_words(x) << 16); }

EEFAST_INLINE Floats load(const Float16* x) {
#if defined(EEFAST_X86) && EEFAST_LANES == 16
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(EEFAST_X86) && EEFAST_LANES == 8
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  const Words bits = load_words(x);
  const Words magnitude = (bits & 0x7fff) << 13;
  // The product moves the exponent's bias from 15 to 127 and is exact, also for subnormal numbers.
  const Words scaled = (Words)((Floats)magnitude * 0x1p112f);
  const Words infinite = (Words)(magnitude >= (31u << 23)) & 0x7f800000u;
  return (Floats)(scaled | infinite | (bits & 0x8000) << 16);
#endif
}

EEFAST_INLINE Floats load(const double* x) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(x[i]);
  return load(lanes);
}

// The `n` elements at x, x + stride, …; zero in the remaining lanes.
template <class T>
EEFAST_INLINE Floats load_part(const T* x, int64_t n, int64_t stride = 1) {
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = x[i * stride];
  return load(lanes);
}

EEFAST_INLINE void store(float* x, Floats v) { std::memcpy(x, &v, sizeof(v)); }

// Adds the halves of a vector until four lanes are left.
template <int64_t n = kLanes>
EEFAST_INLINE Quad fold_lanes(typename FloatVector<n>::type v) {
  if constexpr (n == 4) {
    return v;
  } else {
    typename FloatVector<n / 2>::type halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return fold_lanes<n / 2>(halves[0] + halves[1]);
  }
}

EEFAST_INLINE float sum_lanes(Floats v) {
  const Quad q = fold_lanes(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// Of the units of `unit` lanes that `a` and `b` consist of, in order within each span of `span` lanes, the
// even ones plus the odd ones.
template <int64_t unit, int64_t span, int64_t... i>
EEFAST_INLINE Floats add_neighbours(Floats a, Floats b, std::integer_sequence<int64_t, i...>) {
  // The lane of the even unit that goes to lane i, counted on through `a` and `b` of the span.
  constexpr auto from = [](int64_t lane) { return lane % span / unit * 2 * unit + lane % unit; };
  const Floats even = {(from(i) < span ? a[i / span * span + from(i) % span] : b[i / span * span + from(i) % span])...};
  const Floats odd = {
      (from(i) < span ? a[i / span * span + from(i) % span + unit] : b[i / span * span + from(i) % span + unit])...};
  return even + odd;
}

// The sums of n vectors, side by side.
template <int64_t n = kLanes>
EEFAST_INLINE Floats sum_lanes(const Floats* v) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    constexpr bool near = n <= 4;
    return add_neighbours<near ? 1 : 4, near ? 4 : kLanes>(sum_lanes<n / 2>(v), sum_lanes<n / 2>(v + n / 2),
                                                           std::make_integer_sequence<int64_t, kLanes>());
  }
}

// e^x for -87 ≤ x ≤ 89, NaN for NaN: 2^n · e^r with |r| ≤ log(2) / 2 and Cephes' polynomial for e^r.
EEFAST_INLINE Floats exp_between(Floats x) {
  constexpr float kRound = 0x1.8p23f;
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (Floats)(((Words)shifted << 23) + 0x3f800000u);
}
