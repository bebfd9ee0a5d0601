// Vectors of 8-bit codes for one vector width: products with weights, rounding to codes, averages. No include guard:
// included after lanes.h and activation_lanes.h, with EEFAST_VNNI where the processor multiplies codes
// itself: 1 for AVX-512's instructions, 2 for AVX-VNNI's.

// As many codes as a vector holds; as many sums of products, one for every four of them.
typedef uint8_t Codes __attribute__((vector_size(4 * EEFAST_LANES)));
typedef int32_t Sums __attribute__((vector_size(4 * EEFAST_LANES)));

constexpr int64_t kCodes = 4 * kLanes;

// The longest strip: every length from 1 on is compiled, so sanitized ones are short.
constexpr int64_t longest_strip(int64_t length) {
#ifdef EEFAST_SANITIZED
  return length < 2 ? length : 2;
#else
  return length;
#endif
}

template <class Vector, class T>
EEFAST_INLINE Vector load_as(const T* x) {
  Vector v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

// The four codes at x, for every lane.
EEFAST_INLINE Codes four_codes(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof(four));
#if EEFAST_LANES == 16
  return (Codes)_mm512_set1_epi32(four);
#elif EEFAST_LANES == 8
  return (Codes)_mm256_set1_epi32(four);
#else
  return (Codes)(Sums{four, four, four, four});
#endif
}

// sums + the products of four codes with their four weights, lane by lane; exact.
EEFAST_INLINE Sums add_products(Sums sums, Codes x, Codes weights) {
#if defined(EEFAST_VNNI) && EEFAST_LANES == 16
  return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weights);
#elif EEFAST_VNNI == 2
  return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)x, (__m256i)weights);
#elif defined(EEFAST_VNNI)
  return (Sums)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)x, (__m256i)weights);
#elif EEFAST_LANES == 8
  // In 16 bits, since products of 8-bit pairs would saturate.
  const __m256i zero = _mm256_setzero_si256(), v = (__m256i)x, w = (__m256i)weights;
  const __m256i low =
      _mm256_madd_epi16(_mm256_unpacklo_epi8(v, zero), _mm256_srai_epi16(_mm256_unpacklo_epi8(w, w), 8));
  const __m256i high =
      _mm256_madd_epi16(_mm256_unpackhi_epi8(v, zero), _mm256_srai_epi16(_mm256_unpackhi_epi8(w, w), 8));
  return sums + (Sums)_mm256_hadd_epi32(low, high);
#else
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t k = 0; k < 4; ++k) sums[i] += int32_t{x[4 * i + k]} * static_cast<int8_t>(weights[4 * i + k]);
  }
  return sums;
#endif
}

// Whole numbers nearest to t, ties to even, for |t| < 2^31; the portable kernels take any t.
EEFAST_INLINE Sums rounded(Floats t) {
#if EEFAST_LANES == 16
  return (Sums)_mm512_cvtps_epi32((__m512)t);
#elif EEFAST_LANES == 8
  return (Sums)_mm256_cvtps_epi32((__m256)t);
#else
  Sums n;
  for (int64_t i = 0; i < kLanes; ++i) {
    const float within = t[i] < 256.0f ? t[i] > -1.0f ? t[i] : -1.0f : 256.0f;
    n[i] = static_cast<int32_t>(std::nearbyint(within));
  }
  return n;
#endif
}

// 0 … 256, infinities as well; NaN becomes 0.
EEFAST_INLINE Floats within_codes(Floats t) {
  const Floats low = (Floats)((Words)t & (Words)(t > 0.0f)), most = splat(256.0f);
  const Words high = (Words)(low > most);
  return (Floats)(((Words)most & high) | ((Words)low & ~high));
}

EEFAST_INLINE Floats as_floats(Sums n) {
#if EEFAST_LANES == 16
  return (Floats)_mm512_cvtepi32_ps((__m512i)n);
#elif EEFAST_LANES == 8
  return (Floats)_mm256_cvtepi32_ps((__m256i)n);
#else
  Floats t;
  for (int64_t i = 0; i < kLanes; ++i) t[i] = static_cast<float>(n[i]);
  return t;
#endif
}

EEFAST_INLINE Floats load(const uint8_t* x) {
#if EEFAST_LANES == 16
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#elif EEFAST_LANES == 8
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
  Floats t;
  for (int64_t i = 0; i < kLanes; ++i) t[i] = static_cast<float>(x[i]);
  return t;
#endif
}

// a · b + c where a · b is exact, so that fused or not it is the same number.
EEFAST_INLINE Floats add_exact_product(Floats a, Floats b, Floats c) {
#if EEFAST_LANES == 16
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif EEFAST_LANES == 8
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// a · b as a float of its own: compilers may fuse it with no addition.
EEFAST_INLINE Floats product(Floats a, Floats b) {
  Floats t = a * b;
#if defined(EEFAST_X86)
  __asm__("" : "+v"(t));
#elif defined(__aarch64__)
  __asm__("" : "+w"(t));
#endif
  return t;
}

// Four vectors of whole numbers, cut off at 0 and 255, one after the other.
EEFAST_INLINE Codes narrow(const Sums* n) {
#if EEFAST_LANES == 16
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packs_epi32((__m512i)n[0], (__m512i)n[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)n[2], (__m512i)n[3]);
  return (Codes)_mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
#elif EEFAST_LANES == 8
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i low = _mm256_packs_epi32((__m256i)n[0], (__m256i)n[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)n[2], (__m256i)n[3]);
  return (Codes)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
#else
  Codes codes;
  for (int64_t i = 0; i < kCodes; ++i) {
    codes[i] = static_cast<uint8_t>(std::clamp(n[i / kLanes][i % kLanes], int32_t{0}, int32_t{255}));
  }
  return codes;
#endif
}

// Stores the first n of a vector's codes.
template <int64_t n>
EEFAST_INLINE void store_codes(uint8_t* out, Codes codes) {
#if EEFAST_LANES == 16
  if constexpr (n == 64) _mm512_storeu_si512(out, (__m512i)codes);
  if constexpr (n == 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256((__m512i)codes));
  if constexpr (n == 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128((__m512i)codes));
#else
  std::memcpy(out, &codes, n);
#endif
}

// Its parts of n codes, `pitch` apart.
template <int64_t n, int64_t parts>
EEFAST_INLINE void store_parts(uint8_t* out, int64_t pitch, Codes codes) {
#if EEFAST_LANES == 16
  const __m512i v = (__m512i)codes;
  if constexpr (n == 32) {
    if constexpr (parts > 0) store_codes<32>(out, codes);
    if constexpr (parts > 1)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + pitch), _mm512_extracti64x4_epi64(v, 1));
  } else {
    static_assert(n == 16);
    const auto at = [&](int64_t i) { return reinterpret_cast<__m128i*>(out + i * pitch); };
    if constexpr (parts > 0) store_codes<16>(out, codes);
    if constexpr (parts > 1) _mm_storeu_si128(at(1), _mm512_extracti32x4_epi32(v, 1));
    if constexpr (parts > 2) _mm_storeu_si128(at(2), _mm512_extracti32x4_epi32(v, 2));
    if constexpr (parts > 3) _mm_storeu_si128(at(3), _mm512_extracti32x4_epi32(v, 3));
  }
#else
  uint8_t bytes[kCodes];
  std::memcpy(bytes, &codes, kCodes);
  for (int64_t i = 0; i < parts; ++i) std::memcpy(out + i * pitch, bytes + i * n, n);
#endif
}

// Rounds to codes.
EEFAST_INLINE void store(uint8_t* out, Floats t) {
  const Sums whole = rounded(within_codes(t)), four[4] = {whole, whole, whole, whole};
  store_codes<kLanes>(out, narrow(four));
}

// One row of up to four channels as pixels of four codes: x · multiplier + shift, in two roundings; whether any x is
// NaN.
template <int64_t channels>
EEFAST_INLINE bool store_image_codes(const float* const* rows, int64_t n, const float* multipliers, const float* shifts,
                                     uint8_t* out) {
  Words broken = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t used = std::min(kLanes, n - i);
    Sums pixels = {};
    EEFAST_UNROLL
    for (int64_t c = 0; c < channels; ++c) {
      float part[kLanes] = {};
      if (used < kLanes) std::memcpy(part, rows[c] + i, used * sizeof(float));
      const Floats values = load(used < kLanes ? part : rows[c] + i);
      broken |= (Words)(values != values);
      const Floats t = product(values, splat(multipliers[c])) + splat(shifts[c]);
      const Sums whole = rounded(within_codes(t));
      pixels |= (whole - (whole >> 8)) << (8 * c);  // 256 is 255
    }
    std::memcpy(out + 4 * i, &pixels, 4 * used);
  }
  uint32_t any = 0;
  for (int64_t i = 0; i < kLanes; ++i) any |= broken[i];
  return any != 0;
}
