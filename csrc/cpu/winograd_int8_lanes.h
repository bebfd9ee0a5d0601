// Winograd convolution F(2, 3) along x of 8-bit codes for one vector width. No include guard: included after
// direct_int8_lanes.h.
//
// Of the columns d0 … d3 that a tile of two outputs reads, (d0 - d2) / 2 + 128, (d1 + d2) / 2, (d1 - d2) / 2 + 128 and
// (d1 - d3) / 2 + 128 are one average of bytes each and stay codes: four products m0 … m3 for each row and channel
// instead of six. Even outputs are m0 + m1 - m2, odd ones m1 + m2 + m3; what 128 and rounding add is in the start.

EEFAST_INLINE Codes average(Codes a, Codes b) {
#if EEFAST_LANES == 16
  return (Codes)_mm512_avg_epu8((__m512i)a, (__m512i)b);
#elif EEFAST_LANES == 8
  return (Codes)_mm256_avg_epu8((__m256i)a, (__m256i)b);
#else
  return (a | b) - (((a ^ b) >> 1) & 127);
#endif
}

// Transformed columns of as many tiles as there are in a vector, `plane` bytes between the four.
EEFAST_INLINE void store_tiles(uint8_t* v, int64_t plane, Codes d0, Codes d1, Codes d2, Codes d3) {
  std::memcpy(v, &(const Codes&)(d0 = average(d0, ~d2)), kCodes);
  const Codes sum = average(d1, d2), difference = average(d1, ~d2), last = average(d1, ~d3);
  std::memcpy(v + plane, &sum, kCodes);
  std::memcpy(v + 2 * plane, &difference, kCodes);
  std::memcpy(v + 3 * plane, &last, kCodes);
}

// One row of a map, from its column -1 → [4][tiles][channels], `plane` bytes between the four.
EEFAST_INLINE void transform_row(const uint8_t* row, int64_t tiles, int64_t channels, uint8_t* v, int64_t plane) {
#if EEFAST_LANES == 16
  const auto at = [&](int64_t byte) EEFAST_TARGET
      __attribute__((always_inline)) { return _mm512_loadu_si512(row + byte); };
  if (channels == 16) {
    for (int64_t t = 0; t < tiles; t += 4, v += 64, row += 128) {
      const __m512i a = at(0), b = at(64), c = at(32), d = at(96);
      store_tiles(v, plane, (Codes)_mm512_shuffle_i64x2(a, b, 0x88), (Codes)_mm512_shuffle_i64x2(a, b, 0xdd),
                  (Codes)_mm512_shuffle_i64x2(c, d, 0x88), (Codes)_mm512_shuffle_i64x2(c, d, 0xdd));
    }
    return;
  }
  if (channels == 32) {
    for (int64_t t = 0; t < tiles; t += 2, v += 64, row += 128) {
      const __m512i a = at(0), b = at(64), c = at(128);
      store_tiles(v, plane, (Codes)_mm512_shuffle_i64x2(a, b, 0x44), (Codes)_mm512_shuffle_i64x2(a, b, 0xee),
                  (Codes)_mm512_shuffle_i64x2(b, c, 0x44), (Codes)_mm512_shuffle_i64x2(b, c, 0xee));
    }
    return;
  }
#endif
  // Vectors that reach over the last channel write what the next tile writes again.
  for (int64_t t = 0; t < tiles; ++t, row += 2 * channels, v += channels) {
    for (int64_t c = 0; c < channels; c += kCodes) {
      const uint8_t* const d = row + c;
      store_tiles(v + c, plane, load_as<Codes>(d), load_as<Codes>(d + channels), load_as<Codes>(d + 2 * channels),
                  load_as<Codes>(d + 3 * channels));
    }
  }
}

// Tiles of a strip, and rows of them.
template <int64_t vectors>
constexpr int64_t kTiles = kLanes == 16  ? longest_strip(4)
                           : kLanes == 8 ? 3
                                         : 1;
template <int64_t vectors>
constexpr int64_t kTileRows = kLanes == 16 && vectors == 1 ? 2 : 1;

// bytes: from one tile to the next, or 0 for any. rows: the transformed rows that the first output row reads, and the
// next ones.
template <int64_t bytes, int64_t vectors, int64_t tile_rows, int64_t tiles>
EEFAST_TARGET static void int8_tiles(const Map& from, const Map& to, const uint8_t* const* rows, int64_t first,
                                     int64_t columns, uint8_t* out, const uint8_t* residual, const Int8Weights& numbers,
                                     int64_t part) {
  constexpr int64_t n = tiles * vectors;
  Sums even[tile_rows][n], odd[tile_rows][n];
  EEFAST_UNROLL
  for (int64_t v = 0; v < vectors; ++v) {
    const Sums sum = load_as<Sums>(numbers.start + part + v * kLanes);
    const Sums difference = load_as<Sums>(numbers.difference + part + v * kLanes);
    EEFAST_UNROLL
    for (int64_t r = 0; r < tile_rows; ++r) {
      EEFAST_UNROLL
      for (int64_t t = 0; t < tiles; ++t) even[r][t * vectors + v] = sum, odd[r][t * vectors + v] = difference;
    }
  }
  const int64_t plane = transformed_plane(from), pitch = bytes == 0 ? from.block : bytes, tap = 4 * numbers.width;
  const uint8_t* weight = numbers.weight + 4 * part;
  const auto multiply = [&](Sums(&sums)[tile_rows][n], int64_t place) EEFAST_TARGET __attribute__((always_inline)) {
    Codes w[3][vectors];
    EEFAST_UNROLL
    for (int64_t i = 0; i < 3; ++i) {
      EEFAST_UNROLL
      for (int64_t v = 0; v < vectors; ++v) w[i][v] = load_as<Codes>(weight + i * tap + 4 * v * kLanes);
    }
    weight += 3 * tap;
    EEFAST_UNROLL
    for (int64_t y = 0; y < tile_rows + 2; ++y) {
      const uint8_t* const x = rows[y] + place;
      EEFAST_UNROLL
      for (int64_t t = 0; t < tiles; ++t) {
        const Codes four = four_codes(x + t * pitch);
        EEFAST_UNROLL
        for (int64_t i = 0; i < 3; ++i) {
          if (y < i || y - i >= tile_rows) continue;
          EEFAST_UNROLL
          for (int64_t v = 0; v < vectors; ++v) {
            sums[y - i][t * vectors + v] = add_products(sums[y - i][t * vectors + v], four, w[i][v]);
          }
        }
      }
    }
  };
  const int64_t place = first * pitch;
  for (int64_t c = 0; c < from.channels; c += 4) {
    multiply(even, plane + place + c);
    multiply(odd, 2 * plane + place + c);
  }
  EEFAST_UNROLL
  for (int64_t r = 0; r < tile_rows; ++r) {
    EEFAST_UNROLL
    for (int64_t k = 0; k < n; ++k) {
      const Sums p = even[r][k], q = odd[r][k];
      even[r][k] = p - q;
      odd[r][k] = p + q;
    }
  }
  for (int64_t c = 0; c < from.channels; c += 4) {
    multiply(even, place + c);
    multiply(odd, 3 * plane + place + c);
  }
  EEFAST_UNROLL
  for (int64_t r = 0; r < tile_rows; ++r) {
    Sums sums[2 * n];
    EEFAST_UNROLL
    for (int64_t t = 0; t < tiles; ++t) {
      EEFAST_UNROLL
      for (int64_t v = 0; v < vectors; ++v) {
        sums[2 * t * vectors + v] = even[r][t * vectors + v];
        sums[(2 * t + 1) * vectors + v] = odd[r][t * vectors + v];
      }
    }
    uint8_t* const o = out + r * to.row_pitch;
    const uint8_t* const a = residual == nullptr ? nullptr : residual + r * to.row_pitch;
    if (columns >= 2 * tiles) {
      store_pixels<vectors, 2 * tiles>(sums, o, a, to.block, numbers.scale + part, numbers.ratio);
    } else {
      store_pixels<vectors, 2 * tiles - 1>(sums, o, a, to.block, numbers.scale + part, numbers.ratio);
    }
  }
}

template <int64_t bytes, int64_t vectors, int64_t tile_rows, int64_t tiles>
EEFAST_TARGET static void int8_tile_strips(int64_t n, const Map& from, const Map& to, const uint8_t* const* rows,
                                           int64_t first, int64_t columns, uint8_t* out, const uint8_t* residual,
                                           const Int8Weights& numbers, int64_t part) {
  if constexpr (tiles > 1) {
    if (n < tiles) {
      return int8_tile_strips<bytes, vectors, tile_rows, tiles - 1>(n, from, to, rows, first, columns, out, residual,
                                                                    numbers, part);
    }
  }
  int8_tiles<bytes, vectors, tile_rows, tiles>(from, to, rows, first, columns, out, residual, numbers, part);
}

template <int64_t bytes, int64_t vectors>
EEFAST_TARGET static void int8_winograd(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                        const void* residual, int64_t group, int64_t begin, int64_t end,
                                        void* scratch) {
  const Int8Weights numbers(step, to, group, 12 * ((from.channels + 3) / 4) * 4 * direct_width(to.blocks));
  constexpr int64_t most = kTileRows<vectors>;
  const int64_t tiles = (to.width + 1) / 2, strips = (tiles + kTiles<vectors> - 1) / kTiles<vectors>;
  uint8_t* const ring = static_cast<uint8_t*>(scratch);
  const int64_t plane = transformed_plane(from);
  const auto transformed = [&](int64_t y) { return ring + (y + 1) % kTransformedRows * 4 * plane; };
  for (int64_t part = 0; part < numbers.width; part += vectors * kLanes) {
    int64_t ready = begin - 1;  // the first row that is not transformed
    for (int64_t y = begin, height; y < end; y += height) {
      height = std::min(most, end - y);
      for (; ready < y + height + 1; ++ready) {
        transform_row(static_cast<const uint8_t*>(in) + from.at(ready, -1), tiles, from.block, transformed(ready),
                      plane);
      }
      const uint8_t* rows[most + 2];
      for (int64_t r = 0; r < height + 2; ++r) rows[r] = transformed(y - 1 + r);
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t t = tiles * s / strips, next = tiles * (s + 1) / strips;
        const int64_t place = to.at(y, 2 * t) + group * numbers.width + part;
        const auto run = height == most ? int8_tile_strips<bytes, vectors, most, kTiles<vectors>>
                                        : int8_tile_strips<bytes, vectors, 1, kTiles<vectors>>;
        run(next - t, from, to, rows, t, to.width - 2 * t, static_cast<uint8_t*>(out) + place,
            residual == nullptr ? nullptr : static_cast<const uint8_t*>(residual) + place, numbers, part);
      }
    }
  }
}
