// Winograd convolution F(2×2, 3×3) of 8-bit codes for one vector width. No include guard: included after
// winograd_int8_lanes.h.
//
// The four averages of winograd_int8_lanes.h along x, then the same four along y: 16 products for each tile of 2×2
// outputs and channel instead of 36, of codes in units of four. For each of the four frequencies along x, the products
// of those along y are added up to two rows of sums; the four pairs of rows are then added up to columns.

// Averages of four rows, as along x.
EEFAST_INLINE void average_rows(const uint8_t* const* rows, int64_t bytes, uint8_t* out, int64_t plane) {
  for (int64_t i = 0; i < bytes; i += kCodes) {
    store_tiles(out + i, 4 * plane, load_as<Codes>(rows[0] + i), load_as<Codes>(rows[1] + i),
                load_as<Codes>(rows[2] + i), load_as<Codes>(rows[3] + i));
  }
}

template <int64_t vectors>
constexpr int64_t kSquares = kLanes == 16  ? longest_strip(8 / vectors)
                             : kLanes == 8 ? 3
                                           : 1;

// One strip. v: [4 along y][4 along x][tiles][channels]; rows, columns: to the end of the map.
template <int64_t bytes, int64_t vectors, int64_t tiles>
EEFAST_TARGET static void int8_squares(const Map& from, const Map& to, const uint8_t* v, int64_t rows, int64_t columns,
                                       uint8_t* out, const uint8_t* residual, const Int8Weights& numbers,
                                       int64_t part) {
  constexpr int64_t n = tiles * vectors;
  const int64_t plane = transformed_plane(from), pitch = bytes == 0 ? from.block : bytes, tap = 4 * numbers.width;
  const uint8_t* weight = numbers.weight + 4 * part;
  const auto multiply = [&](Sums(&sums)[n], const uint8_t* x) EEFAST_TARGET __attribute__((always_inline)) {
    for (int64_t c = 0; c < from.channels; c += 4, weight += tap) {
      Codes w[vectors];
      EEFAST_UNROLL
      for (int64_t k = 0; k < vectors; ++k) w[k] = load_as<Codes>(weight + 4 * k * kLanes);
      EEFAST_UNROLL
      for (int64_t t = 0; t < tiles; ++t) {
        const Codes four = four_codes(x + t * pitch + c);
        EEFAST_UNROLL
        for (int64_t k = 0; k < vectors; ++k) {
          sums[t * vectors + k] = add_products(sums[t * vectors + k], four, w[k]);
        }
      }
    }
  };
  // The upper and the lower row of one frequency along x, added to sums that start from `start` or from zero.
  const auto both_rows = [&](Sums(&rows_of)[2][n], int64_t x, const int32_t* start) EEFAST_TARGET
      __attribute__((always_inline)) {
        EEFAST_UNROLL
        for (int64_t i = 0; i < n; ++i) {
          const int32_t* const first = start + i % vectors * kLanes;
          rows_of[0][i] = start == nullptr ? Sums{} : load_as<Sums>(first);
          rows_of[1][i] = start == nullptr ? Sums{} : load_as<Sums>(first + numbers.outputs);
        }
        multiply(rows_of[0], v + (4 + x) * plane);
        multiply(rows_of[1], v + (8 + x) * plane);
        EEFAST_UNROLL
        for (int64_t i = 0; i < n; ++i) {
          const Sums p = rows_of[0][i], q = rows_of[1][i];
          rows_of[0][i] = p - q;
          rows_of[1][i] = p + q;
        }
        multiply(rows_of[0], v + x * plane);
        multiply(rows_of[1], v + (12 + x) * plane);
      };
  Sums even[2][n], odd[2][n], found[2][n];
  both_rows(even, 1, nullptr);
  both_rows(odd, 2, nullptr);
  EEFAST_UNROLL
  for (int64_t i = 0; i < 2 * n; ++i) {
    const Sums p = even[i / n][i % n], q = odd[i / n][i % n];
    even[i / n][i % n] = p - q;
    odd[i / n][i % n] = p + q;
  }
  both_rows(found, 0, numbers.start + part);
  EEFAST_UNROLL
  for (int64_t i = 0; i < 2 * n; ++i) even[i / n][i % n] += found[i / n][i % n];
  both_rows(found, 3, numbers.start + part + 2 * numbers.outputs);
  EEFAST_UNROLL
  for (int64_t i = 0; i < 2 * n; ++i) odd[i / n][i % n] += found[i / n][i % n];
  EEFAST_UNROLL
  for (int64_t r = 0; r < 2; ++r) {
    if (r == rows) break;
    Sums sums[2 * n];
    EEFAST_UNROLL
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = i / vectors, k = i % vectors;
      sums[2 * t * vectors + k] = even[r][i];
      sums[(2 * t + 1) * vectors + k] = odd[r][i];
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

template <int64_t bytes, int64_t vectors, int64_t tiles>
EEFAST_TARGET static void int8_square_strips(int64_t n, const Map& from, const Map& to, const uint8_t* v, int64_t rows,
                                             int64_t columns, uint8_t* out, const uint8_t* residual,
                                             const Int8Weights& numbers, int64_t part) {
  if constexpr (tiles > 1) {
    if (n < tiles) {
      return int8_square_strips<bytes, vectors, tiles - 1>(n, from, to, v, rows, columns, out, residual, numbers, part);
    }
  }
  int8_squares<bytes, vectors, tiles>(from, to, v, rows, columns, out, residual, numbers, part);
}

// Output rows [begin, end), both even or the end of the map. scratch: [4 rows][4] and [4][4] planes.
template <int64_t bytes, int64_t vectors>
EEFAST_TARGET static void int8_winograd_2d(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                           const void* residual, int64_t group, int64_t begin, int64_t end,
                                           void* scratch) {
  const Int8Weights numbers(step, to, group, 16 * ((from.channels + 3) / 4) * 4 * direct_width(to.blocks));
  const int64_t tiles = (to.width + 1) / 2, strips = (tiles + kSquares<vectors> - 1) / kSquares<vectors>;
  const int64_t plane = transformed_plane(from);
  uint8_t *const ring = static_cast<uint8_t*>(scratch), *const v = ring + 16 * plane;
  const auto transformed = [&](int64_t y) { return ring + (y + 1) % 4 * 4 * plane; };
  for (int64_t part = 0; part < numbers.width; part += vectors * kLanes) {
    int64_t ready = begin - 1;
    for (int64_t y = begin; y < end; y += 2) {
      for (; ready < y + 3; ++ready) {
        // The row beyond what surrounds the map is as empty.
        transform_row(static_cast<const uint8_t*>(in) + from.at(std::min(ready, from.height), -1), tiles, from.block,
                      transformed(ready), plane);
      }
      const uint8_t* rows[4];
      for (int64_t r = 0; r < 4; ++r) rows[r] = transformed(y - 1 + r);
      for (int64_t x = 0; x < 4; ++x) {
        const uint8_t* const of[4] = {rows[0] + x * plane, rows[1] + x * plane, rows[2] + x * plane,
                                      rows[3] + x * plane};
        average_rows(of, tiles * from.block, v + x * plane, plane);
      }
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t t = tiles * s / strips, next = tiles * (s + 1) / strips;
        const int64_t place = to.at(y, 2 * t) + group * numbers.width + part;
        int8_square_strips<bytes, vectors, kSquares<vectors>>(
            next - t, from, to, v + t * from.block, to.height - y, to.width - 2 * t, static_cast<uint8_t*>(out) + place,
            residual == nullptr ? nullptr : static_cast<const uint8_t*>(residual) + place, numbers, part);
      }
    }
  }
}
