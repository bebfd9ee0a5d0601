// Winograd convolution F(m×m, 3×3), m = 2 or 4, for one vector width (Lavin & Gray 2015). No include guard: included
// after direct_lanes.h.
//
// Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A per tile, summed over input channels: for each of the (m + 2)² frequencies a product
// of [tiles, C_in] and [C_in, C_out]. 36 multiplications instead of 144 per 4×4 outputs.
//
// Of rows, F(m, 3): Y = [ (g Gᵀ) ⊙ (d B) ] A for each of the m + 2 frequencies; 6 multiplications instead of 12.

// Rows of Bᵀ d at one column; some come in pairs, which share their sums.
template <int64_t m, int64_t pass>
EEFAST_INLINE void combine_rows(const float* d, int64_t pitch, Floats& p, Floats& q) {
  if constexpr (m == 2) {
    if constexpr (pass == 0) p = load(d) - load(d + 2 * pitch);
    if constexpr (pass == 1) {
      const Floats a = load(d + pitch), b = load(d + 2 * pitch);
      p = a + b;
      q = b - a;
    }
    if constexpr (pass == 2) p = load(d + pitch) - load(d + 3 * pitch);
  } else {
    if constexpr (pass == 0) p = 4.0f * load(d) + (load(d + 4 * pitch) - 5.0f * load(d + 2 * pitch));
    if constexpr (pass == 1) {
      const Floats a = load(d + 4 * pitch) - 4.0f * load(d + 2 * pitch);
      const Floats b = load(d + 3 * pitch) - 4.0f * load(d + pitch);
      p = a + b;
      q = a - b;
    }
    if constexpr (pass == 2) {
      const Floats a = load(d + 4 * pitch) - load(d + 2 * pitch), b = load(d + 3 * pitch) - load(d + pitch);
      p = a + 2.0f * b;
      q = a - 2.0f * b;
    }
    if constexpr (pass == 3) p = 4.0f * load(d + pitch) + (load(d + 5 * pitch) - 5.0f * load(d + 3 * pitch));
  }
}

// One row of (Bᵀ d) B.
template <int64_t m>
EEFAST_INLINE void spread(const Floats* t, float* v, int64_t pitch) {
  if constexpr (m == 2) {
    store(v, t[0] - t[2]);
    store(v + pitch, t[1] + t[2]);
    store(v + 2 * pitch, t[2] - t[1]);
    store(v + 3 * pitch, t[1] - t[3]);
  } else {
    store(v, 4.0f * t[0] + (t[4] - 5.0f * t[2]));
    const Floats a = t[4] - 4.0f * t[2], b = t[3] - 4.0f * t[1];
    store(v + pitch, a + b);
    store(v + 2 * pitch, a - b);
    const Floats c = t[4] - t[2], e = t[3] - t[1];
    store(v + 3 * pitch, c + 2.0f * e);
    store(v + 4 * pitch, c - 2.0f * e);
    store(v + 5 * pitch, 4.0f * t[1] + (t[5] - 5.0f * t[3]));
  }
}

// A whole row of tiles; the two columns that neighbours share are kept.
template <int64_t m, int64_t pass>
EEFAST_INLINE void input_pass(const float* d, int64_t row_pitch, int64_t tiles, float* v, int64_t pitch) {
  constexpr bool two = pass == 1 || (m == 4 && pass == 2);
  constexpr int64_t first = m == 2 ? (pass == 2 ? 3 : pass) : (pass == 0 ? 0 : 2 * pass - 1);
  Floats p[m + 2], q[m + 2];
  EEFAST_UNROLL
  for (int64_t c = 0; c < 2; ++c) combine_rows<m, pass>(d + c * kBlock, row_pitch, p[c], q[c]);
  for (int64_t t = 0; t < tiles; ++t, d += m * kBlock, v += kBlock) {
    EEFAST_UNROLL
    for (int64_t c = 2; c < m + 2; ++c) combine_rows<m, pass>(d + c * kBlock, row_pitch, p[c], q[c]);
    spread<m>(p, v + first * (m + 2) * pitch, pitch);
    if constexpr (two) spread<m>(q, v + (first + 1) * (m + 2) * pitch, pitch);
    EEFAST_UNROLL
    for (int64_t c = 0; c < 2; ++c) {
      p[c] = p[c + m];
      if constexpr (two) q[c] = q[c + m];
    }
  }
}

template <int64_t m>
EEFAST_TARGET static void input_row(const Map& from, const TileRow& row, int64_t block, float* v, int64_t pitch) {
  for (int64_t part = 0; part < kBlock; part += kLanes) {
    const float* const d = row.in + block * from.block_pitch + part;
    input_pass<m, 0>(d, from.row_pitch, row.tiles, v + part, pitch);
    input_pass<m, 1>(d, from.row_pitch, row.tiles, v + part, pitch);
    input_pass<m, 2>(d, from.row_pitch, row.tiles, v + part, pitch);
    if constexpr (m == 4) input_pass<m, 3>(d, from.row_pitch, row.tiles, v + part, pitch);
  }
}

// Whether products of rows stay in registers until they are outputs, see winograd_line.
constexpr bool kWholeLines = kLanes == 16;

// The same of tiles that are one row high.
template <int64_t m>
EEFAST_TARGET static void input_line(const Map& from, const TileRow& row, int64_t block, float* v, int64_t pitch) {
  for (int64_t part = 0; part < kBlock; part += kLanes) {
    const float* d = row.in + block * from.block_pitch + part;
    Floats pixels[m + 2] = {load(d), load(d + kBlock)};
    for (int64_t t = 0; t < row.tiles; ++t, d += m * kBlock) {
      EEFAST_UNROLL
      for (int64_t c = 2; c < m + 2; ++c) pixels[c] = load(d + c * kBlock);
      kWholeLines ? spread<m>(pixels, v + t * (m + 2) * kBlock, kBlock)
                  : spread<m>(pixels, v + t * kBlock + part, pitch);
      pixels[0] = pixels[m];
      pixels[1] = pixels[m + 1];
    }
  }
}

EEFAST_TARGET static void winograd_input(const Step& step, const Map& from, const TileRow& row, int64_t block, float* v,
                                         int64_t pitch) {
  const bool two = step.winograd == 2;
  if (step.rows == 1) return (two ? input_line<2> : input_line<4>)(from, row, block, v, pitch);
  (two ? input_row<2> : input_row<4>)(from, row, block, v, pitch);
}

// A block of the product stays in registers until it is whole, so that it may be stored over its input.
template <int64_t vectors, int64_t tiles>
EEFAST_TARGET static void multiply_tiles(const float* weight, int64_t width, int64_t channels, const float* v,
                                         float* product, int64_t block_pitch) {
  Floats sums[tiles][vectors] = {};
  for (int64_t begin = 0; begin < channels; begin += kBlock, v += block_pitch) {
    const int64_t end = std::min(kBlock, channels - begin);
    for (int64_t c = 0; c < end; ++c, weight += width) {
      Floats w[vectors];
      EEFAST_UNROLL
      for (int64_t k = 0; k < vectors; ++k) w[k] = load(weight + k * kLanes);
      EEFAST_UNROLL
      for (int64_t t = 0; t < tiles; ++t) {
        const Floats x = splat(v[t * kBlock + c]);
        EEFAST_UNROLL
        for (int64_t k = 0; k < vectors; ++k) sums[t][k] = x * w[k] + sums[t][k];
      }
    }
  }
  EEFAST_UNROLL
  for (int64_t t = 0; t < tiles; ++t) {
    EEFAST_UNROLL
    for (int64_t k = 0; k < vectors; ++k) {
      store(product + k / kBlockVectors * block_pitch + t * kBlock + k % kBlockVectors * kLanes, sums[t][k]);
    }
  }
}

template <int64_t vectors, int64_t tiles>
EEFAST_TARGET static void multiply_rest(int64_t n, const float* weight, int64_t width, int64_t channels, const float* v,
                                        float* product, int64_t block_pitch) {
  if constexpr (tiles > 1) {
    if (n < tiles) return multiply_rest<vectors, tiles - 1>(n, weight, width, channels, v, product, block_pitch);
  }
  multiply_tiles<vectors, tiles>(weight, width, channels, v, product, block_pitch);
}

template <int64_t vectors, int64_t most>
EEFAST_TARGET static void multiply(const float* weight, int64_t width, int64_t channels, int64_t tiles, const float* v,
                                   float* product, int64_t block_pitch) {
  const int64_t parts = (tiles + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = tiles * i / parts, n = tiles * (i + 1) / parts - begin;
    multiply_rest<vectors, most>(n, weight, width, channels, v + begin * kBlock, product + begin * kBlock, block_pitch);
  }
}

constexpr int64_t kInPlace = kLanes == 16 ? 64 : kBlock;

EEFAST_TARGET static void winograd_multiply(const Step& step, const Map& from, const Map& to, int64_t frequency,
                                            int64_t tiles, const float* v, float* product, int64_t block_pitch) {
  if (step.rows == 1) {
    const int64_t depth = frequencies_of(step) * kBlock;
    for (int64_t b = 0; b < to.blocks; ++b) {
      multiply<kBlockVectors, kRegisters / kBlockVectors>(step.weight + b * from.channels * depth + frequency * kBlock,
                                                          depth, from.channels, tiles, v, product + b * block_pitch,
                                                          block_pitch);
    }
    return;
  }
  const int64_t width = winograd_width(to.blocks), groups = to.blocks * kBlock / width;
  for (int64_t g = 0; g < groups; ++g) {
    const float* const weight = step.weight + (frequency * groups + g) * from.channels * width;
    float* const out = product + g * width / kBlock * block_pitch;
    if constexpr (kLanes == 16) {
      if (width == 64) multiply<4, 6>(weight, width, from.channels, tiles, v, out, block_pitch);
      if (width == 32) multiply<2, 8>(weight, width, from.channels, tiles, v, out, block_pitch);
      if (width == 16) multiply<1, 16>(weight, width, from.channels, tiles, v, out, block_pitch);
    } else {
      for (int64_t part = 0; part < width; part += kBlock) {
        multiply<kBlockVectors, kRegisters / kBlockVectors>(weight + part, width, from.channels, tiles, v,
                                                            out + part / kBlock * block_pitch, block_pitch);
      }
    }
  }
}

// Rows of Aᵀ M at one column. For m = 4 rows 0, 2 and rows 1, 3 need different sums: vectors of few lanes are also few,
// and two passes over the tile keep them from spilling.
template <int64_t m, int64_t part>
EEFAST_INLINE void gather(const float* x, int64_t pitch, Floats* y) {
  if constexpr (m == 2) {
    const Floats a = load(x + pitch), b = load(x + 2 * pitch);
    y[0] = load(x) + a + b;
    y[1] = (a - b) - load(x + 3 * pitch);
  } else {
    const Floats a = load(x + pitch), b = load(x + 2 * pitch), c = load(x + 3 * pitch), d = load(x + 4 * pitch);
    if constexpr (part != 1) {
      const Floats s = a + b, u = c + d;
      y[0] = (load(x) + s) + u;
      y[2] = 4.0f * u + s;
    }
    if constexpr (part != 0) {
      const Floats s = a - b, u = c - d;
      y[1] = 2.0f * u + s;
      y[3] = (8.0f * u + s) + load(x + 5 * pitch);
    }
  }
}

template <int64_t m>
EEFAST_INLINE void gather_row(const Floats* x, Floats bias, Floats* y) {
  if constexpr (m == 2) {
    y[0] = (x[0] + bias) + x[1] + x[2];
    y[1] = ((x[1] - x[2]) + bias) - x[3];
  } else {
    const Floats s = x[1] + x[2], u = x[3] + x[4], d = x[1] - x[2], e = x[3] - x[4];
    y[0] = ((x[0] + bias) + s) + u;
    y[1] = (2.0f * e + d) + bias;
    y[2] = (4.0f * u + s) + bias;
    y[3] = ((8.0f * e + d) + bias) + x[5];
  }
}

// A row of a tile's outputs, the first `columns` of them unless the tile is whole.
template <int64_t m, bool whole>
EEFAST_INLINE void finish_row(const Step& step, Floats* y, float* out, const float* residual, int64_t columns) {
  EEFAST_UNROLL
  for (int64_t c = 0; c < m; ++c) {
    if (!whole && c >= columns) break;
    if (residual != nullptr) y[c] += load(residual + c * kBlock);
    if (step.relu) y[c] = relu(y[c]);
    store(out + c * kBlock, y[c]);
  }
}

template <int64_t m, int64_t part, bool whole>
EEFAST_INLINE void output_tile(const Step& step, const Map& to, const float* x, int64_t pitch, Floats bias, float* out,
                               const float* residual, int64_t rows, int64_t columns) {
  constexpr int64_t side = m + 2, first = part < 0 ? 0 : part, by = part < 0 ? 1 : 2;
  Floats z[side][m];
  EEFAST_UNROLL
  for (int64_t j = 0; j < side; ++j) gather<m, part>(x + j * pitch, side * pitch, z[j]);
  EEFAST_UNROLL
  for (int64_t r = first; r < m; r += by) {
    if (!whole && r >= rows) break;
    Floats line[side], y[m];
    EEFAST_UNROLL
    for (int64_t j = 0; j < side; ++j) line[j] = z[j][r];
    gather_row<m>(line, bias, y);
    finish_row<m, whole>(step, y, out + r * to.row_pitch, residual == nullptr ? nullptr : residual + r * to.row_pitch,
                         columns);
  }
}

template <int64_t m, bool line, bool whole>
EEFAST_INLINE void output_parts(const Step& step, const Map& to, const float* x, int64_t pitch, Floats bias, float* out,
                                const float* residual, int64_t rows, int64_t columns) {
  if constexpr (line) {
    Floats products[m + 2], y[m];
    EEFAST_UNROLL
    for (int64_t j = 0; j < m + 2; ++j) products[j] = load(x + j * pitch);
    gather_row<m>(products, bias, y);
    finish_row<m, whole>(step, y, out, residual, columns);
  } else if constexpr (m == 4 && kLanes < 16) {
    output_tile<m, 0, whole>(step, to, x, pitch, bias, out, residual, rows, columns);
    output_tile<m, 1, whole>(step, to, x, pitch, bias, out, residual, rows, columns);
  } else {
    output_tile<m, -1, whole>(step, to, x, pitch, bias, out, residual, rows, columns);
  }
}

template <int64_t m, bool line>
EEFAST_TARGET static void output_row(const Step& step, const Map& to, const TileRow& row, int64_t block, const float* x,
                                     int64_t pitch) {
  const int64_t begin = block * to.block_pitch;
  for (int64_t part = 0; part < kBlock; part += kLanes) {
    const Floats bias = load(step.bias + block * kBlock + part);
    for (int64_t t = 0; t < row.tiles; ++t) {
      const int64_t place = begin + t * m * kBlock + part, columns = row.columns - t * m;
      const float* const residual = row.residual == nullptr ? nullptr : row.residual + place;
      if (row.rows >= (line ? 1 : m) && columns >= m) {
        output_parts<m, line, true>(step, to, x + t * kBlock + part, pitch, bias, row.out + place, residual, m, m);
      } else {
        output_parts<m, line, false>(step, to, x + t * kBlock + part, pitch, bias, row.out + place, residual, row.rows,
                                     columns);
      }
    }
  }
  if (step.activation == Activation::none) return;
  for (int64_t r = 0; r < std::min(m, row.rows); ++r) {
    activate(step.activation, row.out + begin + r * to.row_pitch, std::min(row.tiles * m, row.columns) * kBlock);
  }
}

EEFAST_TARGET static void winograd_output(const Step& step, const Map& to, const TileRow& row, int64_t block,
                                          const float* product, int64_t pitch) {
  const bool two = step.winograd == 2;
  if (step.rows == 1) {
    return (two ? output_row<2, true> : output_row<4, true>)(step, to, row, block, product, pitch);
  }
  (two ? output_row<2, false> : output_row<4, false>)(step, to, row, block, product, pitch);
}

// Some neighbouring tiles of a row from their transformed pixels to outputs of one block.
template <int64_t m, int64_t tiles, bool whole>
EEFAST_TARGET static void line_strip(const Step& step, int64_t channels, const float* v, int64_t block_pitch,
                                     const float* weight, Floats bias, float* out, const float* residual,
                                     int64_t columns) {
  constexpr int64_t side = m + 2;
  Floats sums[tiles][side] = {};
  for (int64_t begin = 0; begin < channels; begin += kBlock, v += block_pitch) {
    const int64_t end = std::min(kBlock, channels - begin);
    for (int64_t c = 0; c < end; ++c, weight += side * kBlock) {
      EEFAST_UNROLL
      for (int64_t f = 0; f < side; ++f) {
        const Floats w = load(weight + f * kBlock);
        EEFAST_UNROLL
        for (int64_t t = 0; t < tiles; ++t) sums[t][f] = splat(v[(t * side + f) * kBlock + c]) * w + sums[t][f];
      }
    }
  }
  EEFAST_UNROLL
  for (int64_t t = 0; t < tiles; ++t) {
    Floats y[m];
    gather_row<m>(sums[t], bias, y);
    const int64_t place = t * m * kBlock;
    finish_row<m, whole>(step, y, out + place, residual == nullptr ? nullptr : residual + place, columns - t * m);
  }
}

template <int64_t m, int64_t tiles>
EEFAST_TARGET static void line_strips(int64_t n, const Step& step, int64_t channels, const float* v,
                                      int64_t block_pitch, const float* weight, Floats bias, float* out,
                                      const float* residual, int64_t columns) {
  if constexpr (tiles > 1) {
    if (n < tiles) {
      return line_strips<m, tiles - 1>(n, step, channels, v, block_pitch, weight, bias, out, residual, columns);
    }
  }
  const auto strip = columns >= tiles * m ? line_strip<m, tiles, true> : line_strip<m, tiles, false>;
  strip(step, channels, v, block_pitch, weight, bias, out, residual, columns);
}

template <int64_t m>
EEFAST_TARGET static void line_outputs(const Step& step, const Map& from, const Map& to, const TileRow& row,
                                       int64_t block, const float* v, int64_t block_pitch) {
  constexpr int64_t side = m + 2, most = 24 / side;
  const int64_t begin = block * to.block_pitch, strips = (row.tiles + most - 1) / most;
  const float* const weight = step.weight + block * from.channels * side * kBlock;
  const Floats bias = load(step.bias + block * kBlock);
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t t = row.tiles * s / strips, next = row.tiles * (s + 1) / strips, place = begin + t * m * kBlock;
    line_strips<m, most>(next - t, step, from.channels, v + t * side * kBlock, block_pitch, weight, bias,
                         row.out + place, row.residual == nullptr ? nullptr : row.residual + place,
                         row.columns - t * m);
  }
  if (step.activation == Activation::none) return;
  activate(step.activation, row.out + begin, std::min(row.tiles * m, row.columns) * kBlock);
}

EEFAST_TARGET static void winograd_line(const Step& step, const Map& from, const Map& to, const TileRow& row,
                                        int64_t block, const float* v, int64_t block_pitch) {
  (step.winograd == 2 ? line_outputs<2> : line_outputs<4>)(step, from, to, row, block, v, block_pitch);
}
constexpr decltype(Kernels::winograd_line) kWinogradLine = kWholeLines ? winograd_line : nullptr;
