// Reads a network from the tables of eefast::resident_forward, and checks them.
#include "resident_program.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "checks.h"
#include "tensors.h"

namespace eefast {
namespace {

using torch::headeronly::ScalarType;

// The columns of `steps`, in the order of eefast/ops/resident_forward.py.
enum Column {
  kind,
  source,
  target,
  residual,
  activation,
  kernel,
  stride,
  padding,
  winograd,
  weight,
  packed_place,
  section,
  groups,
  channel,
  one_row
};
constexpr int64_t kColumns = one_row + 1;

// Far beyond all use; below them no product of sizes exceeds 64 bits.
constexpr int64_t kMaxSide = 1 << 14, kMaxChannels = 1 << 15, kMaxClasses = 1 << 18, kMaxKernel = 1 << 7,
                  kMaxSections = 1 << 8;

// Channels and section of a map; in int8 also the code that means zero.
int64_t map_columns(Precision precision) { return precision == Precision::int8 ? 3 : 2; }

std::vector<int64_t> integers(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor, ScalarType::Long, "int64");
  if (!tensor.is_cpu()) fail(name, " is on ", device_name(tensor), "; it is read on the CPU, move it there");
  if (!tensor.is_contiguous()) fail(name, " is not contiguous; call .contiguous()");
  const auto* const values = tensor.const_data_ptr<int64_t>();
  return {values, values + tensor.numel()};
}

struct Program {
  const ResidentSource& tables;
  Network& network;
  std::vector<bool> written;  // which maps, by the steps before

  [[noreturn]] void refuse(int64_t row, const char* what) const { eefast::refuse(tables, row, what); }
  const int64_t* at(int64_t row) const { return tables.steps.data() + row * kColumns; }
  // Section, and whether in its body.
  std::pair<int64_t, bool> place_of(int64_t row) const {
    const int64_t* const s = at(row);
    return {s[section], network.maps[s[source]].section == s[section]};
  }
  int64_t rows() const { return static_cast<int64_t>(tables.steps.size()) / kColumns; }

  void read(int64_t row, int64_t num_exits) {
    const int64_t* const s = at(row);
    const auto maps = static_cast<int64_t>(network.maps.size());
    const auto inside = [&](int64_t map, int64_t first) { return map >= first && map < maps; };
    const auto is = [&](Kind wanted) { return s[kind] == static_cast<int64_t>(wanted); };
    const bool exit = is(Kind::exit), convolution = is(Kind::convolution), scale = is(Kind::scale);
    const bool windows = convolution || is(Kind::max_pool), join = is(Kind::join);
    const bool load = is(Kind::load), store = is(Kind::store);
    if (s[kind] < 0 || s[kind] >= kKinds) refuse(row, "there is no such kind of step");
    if (s[activation] < 0 || s[activation] >= kActivations) refuse(row, "there is no such activation");
    const bool is_exit = s[target] >= 0 && (row + 1 == rows() ? s[target] == num_exits : s[target] < num_exits);
    const bool target_fits = exit ? is_exit : store ? s[target] == -1 : inside(s[target], 1);
    if (!inside(s[source], convolution || load ? 0 : 1) || !target_fits ||
        (s[residual] != -1 && !((convolution || scale) && inside(s[residual], 1))) || (scale && s[residual] == -1)) {
      refuse(row, "there is no such map or exit");
    }
    if (!written[s[source]] || (s[residual] != -1 && !written[s[residual]]))
      refuse(row, "it reads a map before it is written");
    if (!exit && !store) written[s[target]] = true;
    if (load && (row != 0 || s[source] != 0))
      refuse(row, "it is not the first step, or loads something else than map 0");
    if (network.loads && s[source] == 0) refuse(row, "it reads features that are loaded into another map");
    if (store && row + 1 != rows()) refuse(row, "a map is stored by the last step only");
    if (store &&
        (row == 0 || at(row - 1)[kind] != static_cast<int64_t>(Kind::exit) || at(row - 1)[target] + 1 != num_exits)) {
      refuse(row, "a map is stored after the last early exit only");
    }
    if ((windows || join || is(Kind::mean)) && s[source] == s[target]) refuse(row, "it writes over what it reads");
    if ((join || exit || load || store || is(Kind::max_pool)) && s[activation] != 0)
      refuse(row, "it has no activation");
    if (s[section] < 0 || s[section] >= static_cast<int64_t>(network.sections.size()))
      refuse(row, "there is no such section");
    const Map& from = network.maps[s[source]];
    const int64_t to_section = exit || store ? from.section : network.maps[s[target]].section;
    const bool entry = from.section != s[section];
    if (to_section != s[section] || (entry && from.section != s[section] - 1) || ((exit || store) && entry) ||
        (s[residual] != -1 && network.maps[s[residual]].section != s[section]) || (s[source] == 0 && s[section] != 0)) {
      refuse(row, "its maps are of other sections");
    }
    if (row > 0 && std::pair(s[section], !entry) < place_of(row - 1))
      refuse(row, "it comes after steps of a later section");
    if (windows && (s[kernel] < 1 || s[kernel] > kMaxKernel || s[stride] < 1 || s[stride] > kMaxKernel ||
                    s[padding] < 0 || s[padding] > s[kernel] || (convolution && s[stride] > 2))) {
      refuse(row, "there is no kernel for this window");
    }
    if (s[one_row] != 0 && !(s[one_row] == 1 && windows)) refuse(row, "only windows are one row high");
    const bool int8 = network.precision == Precision::int8;
    if (int8 &&
        ((s[kind] > static_cast<int64_t>(Kind::exit) && !load && !store) || s[activation] > 1 || s[groups] != 1))
      refuse(row, "INT8 has no such step");
    const Map& to = network.maps[exit || store ? s[source] : s[target]];
    if (convolution && (s[groups] < 1 || from.channels % s[groups] != 0 || to.channels % s[groups] != 0))
      refuse(row, "its channels are no multiple of its groups");
    if (convolution && s[groups] > 1 && s[source] == 0) refuse(row, "images have no groups");
    if (join && (s[channel] < 0 || s[channel] > to.channels - from.channels))
      refuse(row, "its channels are outside of its target");
    const bool fits = s[groups] == 1 && !(s[one_row] == 1 && int8) && s[kernel] == 3 && s[stride] == 1 &&
                      s[padding] == 1 && s[source] != 0 && network.precision != Precision::bfloat16 && from.zero == 0;
    if (s[winograd] != 0 && !(convolution && fits && (s[winograd] == 2 || s[winograd] == (int8 ? 1 : 4)))) {
      refuse(row,
             int8 ? "Winograd is for 3×3 convolutions of stride 1 and padding 1 of maps with zero 0, on 1 or 2 axes"
                  : "Winograd is for float32 3×3 convolutions, of rows 3, of stride 1 and padding 1, tiles of 2 or 4");
    }
    const bool first = is(Kind::affine) && !int8 && to.channels < from.channels && to.channels % kBlock == 0;
    if (load && from.channels > to.channels) refuse(row, "its target has too few channels");
    if (!convolution && !exit && !join && !load && from.channels != to.channels && !first)
      refuse(row, "it cannot change channels");
    if (scale && network.maps[s[residual]].channels != to.channels) refuse(row, "its residual has another shape");
    Step step{};
    step.kind = static_cast<Kind>(s[kind]);
    step.source = s[source];
    step.target = s[target];
    step.residual = s[residual];
    step.relu = s[activation] == static_cast<int64_t>(Activation::relu);
    step.activation = step.relu ? Activation::none : static_cast<Activation>(s[activation]);
    step.groups = convolution ? s[groups] : 1;
    step.channel = join ? s[channel] : 0;
    step.flatten = exit && s[kernel] != 0;
    step.kernel = s[kernel];
    step.stride = s[stride];
    step.padding = s[padding];
    step.rows = s[one_row] == 1 ? 1 : s[kernel];
    step.above = s[one_row] == 1 ? 0 : s[padding];
    step.winograd = s[winograd];
    step.section = s[section];
    if (load) network.loads = true;
    if (store) network.stored = s[source];
    step.row = row;
    step.place = s[packed_place];
    step.entry = entry;
    Section& target_section = network.sections[s[section]];
    (entry ? target_section.entry : target_section.body).push_back(step);
  }
};

}  // namespace

void refuse(const ResidentSource& source, int64_t row, const char* what) {
  const auto first = source.steps.begin() + row * kColumns;
  fail("steps[", row, "] = ", brackets(std::vector<int64_t>(first, first + kColumns)), ": ", what);
}

Network read_network(const ResidentSource& source) {
  Network network{source.precision, source.num_classes, parse_criterion(source.criterion), {}, {}};
  network.num_exits = source.num_exits;
  for (const int64_t group : source.groups) {
    if (group < 1 || group > 64) fail("groups has ", group, "; expected 1 … 64");
    network.sections.push_back({group, 0, {}, {}});
  }
  const std::size_t columns = map_columns(source.precision);
  for (std::size_t i = 0; i < source.maps.size(); i += columns) {
    Map map{};
    map.channels = source.maps[i];
    map.section = source.maps[i + 1];
    if (map.channels < 1 || map.channels > kMaxChannels || (i == 0 ? map.section != -1 : map.section < 0) ||
        map.section >= static_cast<int64_t>(network.sections.size())) {
      fail("maps[", i / columns, "] = [", map.channels, ", ", map.section,
           "]; expected channels and a section, the image first");
    }
    if (columns == 3) map.zero = source.maps[i + 2];
    if (map.zero < 0 || map.zero > 255) fail("maps[", i / columns, "] has the zero ", map.zero, "; expected 0 … 255");
    network.maps.push_back(map);
  }
  if (source.channels != network.maps[0].channels) {
    fail("images has ", source.channels, " channels; expected ", network.maps[0].channels);
  }
  Program program{source, network, std::vector<bool>(network.maps.size())};
  program.written[0] = true;
  for (int64_t row = 0; row < program.rows(); ++row) program.read(row, source.num_exits);
  const auto& last = network.sections.back().body;
  const bool final_exit = !last.empty() && last.back().kind == Kind::exit && last.back().target == source.num_exits;
  if (!final_exit && network.stored < 0) fail("steps ends with no final exit");
  if (const char* const problem = lay_out(network, source.height, source.width)) {
    fail("images of ", source.height, "×", source.width, " ", problem);
  }
  return network;
}

ResidentSource read_tables(const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups,
                           const Tensor& packed, const Tensor& thresholds, const std::string& criterion,
                           int64_t num_classes, Precision precision) {
  for (const auto& [name, tensor] : Named{{"images", &images},
                                          {"packed", &packed},
                                          {"thresholds", &thresholds},
                                          {"steps", &steps},
                                          {"maps", &maps},
                                          {"groups", &groups}}) {
    check_there(name, *tensor);
    check_stored(name, *tensor);
  }
  check_dtype("packed", packed, ScalarType::Float, "float32");
  check_dtype("thresholds", thresholds, ScalarType::Float, "float32");
  if (images.dim() != 4) fail("images has shape ", shape(images), "; expected [N, C, H, W]");
  if (thresholds.dim() != 1 && (thresholds.dim() != 2 || thresholds.size(1) != images.size(0)))
    fail("thresholds has shape ", shape(thresholds), "; expected [exits] or [exits, N]");
  if (packed.dim() != 1 || !packed.is_contiguous())
    fail("packed has shape ", shape(packed), " and strides ", brackets(packed.strides()),
         "; expected one dense dimension");
  if (num_classes < 1 || num_classes > kMaxClasses) fail("num_classes = ", num_classes, "; expected 1 … ", kMaxClasses);
  if (images.size(2) > kMaxSide || images.size(3) > kMaxSide) {
    fail("images has shape ", shape(images), "; expected at most ", kMaxSide, " rows and columns");
  }
  if (steps.dim() != 2 || steps.size(1) != kColumns || steps.size(0) == 0) {
    fail("steps has shape ", shape(steps), "; expected [S, ", kColumns, "]");
  }
  const int64_t columns = map_columns(precision);
  if (maps.dim() != 2 || maps.size(1) != columns || maps.size(0) == 0)
    fail("maps has shape ", shape(maps), "; expected [M, ", columns, "]");
  // A sample that goes on calls the next section.
  if (groups.dim() != 1 || groups.size(0) == 0 || groups.size(0) > kMaxSections) {
    fail("groups has shape ", shape(groups), "; expected [sections], at most ", kMaxSections);
  }
  return {integers("steps", steps),
          integers("maps", maps),
          integers("groups", groups),
          packed,
          packed.const_data_ptr<float>(),
          criterion,
          num_classes,
          precision,
          images.size(1),
          images.size(2),
          images.size(3),
          thresholds.size(0)};
}

}  // namespace eefast
