// Images that come one by one → their answers, each as soon as its image exits.
#include "cpu/resident_loop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef __linux__
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace eefast::cpu {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// What may be under way for each worker: enough that images that go on fill groups; less where maps are large, so that
// all of them take no more than this.
constexpr int64_t kPlaces = 16, kPlacesBytes = int64_t{1} << 26;

// Images with a deadline before their first exit, those that are due, arrivals, before early exits, before the final
// one; none.
constexpr int64_t kUrgent = -2, kDue = -1, kArrivals = 0, kEarly = 1, kFinal = 2, kRanks = 3;

// After so many times the seconds of a whole image nothing that comes later goes before an image: else those that reach
// the final exit would wait for as long as others come.
constexpr double kPatience = 2;

// Images that wait, for each worker, from which on single images go to their exits without a stop, with their maps in
// the cache: who comes waits long in any case.
constexpr std::size_t kRush = 3;

// Of observations that count: the last ones weigh one in so many.
constexpr double kRecent = 16;

// Seconds after answers were taken in which others are gathered, and how many at most: waking the one who takes them
// costs more than an early exit.
constexpr double kGather = 5e-4;
constexpr std::size_t kGathered = 16;

// Where a delay counts that is longer than usual, and one that is shorter; the part of an image's time that it may
// take.
constexpr double kLonger = 0.25, kShorter = 1.0 / 64, kDelayShare = 0.5;

// By how much the threads are nicer than the one that makes them, and the nanoseconds that they ask to run at a time,
// the most that Linux grants: from 6.12 on a thread that wakes and asks for less runs at once.
constexpr int kNicer = 5, kNicest = 19;
constexpr uint64_t kSlice = 100'000'000;

// Threads that hand answers out, and in images, wait for up to 4 ms where all cores compute; they need .1 ms. Without a
// word where the system does not let threads choose.
void give_way() {
#if defined(__linux__) && defined(SYS_sched_setattr)
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } wanted{};
  wanted.size = sizeof wanted;
  wanted.nice = std::min(getpriority(PRIO_PROCESS, 0) + kNicer, kNicest);
  wanted.runtime = kSlice;
  static_cast<void>(syscall(SYS_sched_setattr, 0, &wanted, 0));
#endif
}

}  // namespace

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

ResidentLoop::ResidentLoop(const Network& network, std::vector<float> scaling, std::vector<float> rule, int64_t workers,
                           int64_t* counts)
    : network_(network),
      scaling_(std::move(scaling)),
      rule_(std::move(rule)),
      workers_(workers),
      counts_(counts),
      rank_(kRanks),
      due_(kNever),
      patience_(kNever) {
  int64_t passed = 0, bytes = 1;
  for (std::size_t s = 0; s < network.sections.size(); ++s) {
    const Section& section = network.sections[s];
    bytes += section.slot_size;
    const auto steps = static_cast<int64_t>(section.body.size());
    int64_t first = 0;
    const auto end = [&](int64_t last, bool exit) {
      const int64_t rank = passed == 0 ? kArrivals : passed < network.num_exits ? kEarly : kFinal;
      pieces_.push_back(
          {static_cast<int64_t>(s), first, last, passed, rank, last == steps && s + 1 < network.sections.size()});
      passed += exit;
      first = last;
    };
    for (int64_t i = 0; i < steps; ++i) {
      if (section.body[i].kind == Kind::exit) end(i + 1, true);
    }
    if (first < steps || steps == 0) end(steps, false);
  }
  places_ = std::clamp(kPlacesBytes / bytes, int64_t{2}, kPlaces) * workers;
  const int64_t n = network.num_exits;
  limits_.resize(places_ * std::max<int64_t>(n, 1));
  logits_.resize(places_ * network.num_classes);
  confidence_.resize(places_);
  exits_.resize(places_);
  rows_.resize(places_);
  waiting_.resize(pieces_.size());
  seconds_.resize(pieces_.size());
  under_way_.resize(n + 1);
  free_slots_.resize(network.sections.size());
  Batch batch{};
  batch.scaling = scaling_.data();
  batch.samples = places_;
  batch.thresholds = limits_.data();
  batch.thresholds_of_each = true;
  batch.rule = rule_.empty() ? nullptr : rule_.data();
  batch.logits = logits_.data();
  batch.confidence = confidence_.data();
  batch.exits = exits_.data();
  batch.every_answer = true;
  for (int64_t w = 0; w < workers; ++w) {
    carriers_.push_back(std::make_unique<Carrier>(network, batch, places_ / workers));
    for (std::size_t s = 0; s < free_slots_.size(); ++s) {
      for (Slot& slot : carriers_.back()->slots(s)) free_slots_[s].push_back(&slot);
    }
  }
  for (int64_t place = 0; place < places_; ++place) {
    rows_[place].place = place;
    rows_[place].piece = -1;
    free_rows_.push_back(&rows_[place]);
  }
  publish();
  working_ = workers;
  try {
    for (auto& carrier : carriers_) threads_.emplace_back([this, &carrier] { work(*carrier); });
  } catch (const std::exception& error) {
    close(true);
    for (std::thread& thread : threads_) thread.join();
    throw std::runtime_error("thread " + std::to_string(threads_.size() + 1) + " of " + std::to_string(workers) +
                             " could not be started (" + error.what() + "); give fewer workers");
  }
}

ResidentLoop::~ResidentLoop() {
  close(true);
  for (std::thread& thread : threads_) thread.join();
}

bool ResidentLoop::put(std::vector<Arrival> arrivals) {
  const std::lock_guard<std::mutex> lock(lock_);
  if (closed_) return false;
  const auto count = static_cast<int64_t>(arrivals.size());
  for (Arrival& arrival : arrivals) line_.push_back(std::move(arrival));
  publish();
  for (int64_t i = 0; i < std::min(count, idle_); ++i) wake_.notify_one();
  return true;
}

void ResidentLoop::cancel(int64_t ticket) {
  const std::lock_guard<std::mutex> lock(lock_);
  // In the order of their tickets.
  const auto at = std::lower_bound(line_.begin(), line_.end(), ticket,
                                   [](const Arrival& arrival, int64_t wanted) { return arrival.ticket < wanted; });
  if (at != line_.end() && at->ticket == ticket) {
    line_.erase(at);
    drop(ticket);
    return publish();
  }
  for (std::size_t p = 1; p < waiting_.size(); ++p) {
    for (auto row = waiting_[p].begin(); row != waiting_[p].end(); ++row) {
      if ((*row)->image.ticket != ticket) continue;
      Row& found = **row;
      waiting_[p].erase(row);
      answer(found, -1, 0);
      return publish();
    }
  }
  for (Row& row : rows_) row.cancelled |= row.piece >= 0 && row.image.ticket == ticket;
}

void ResidentLoop::close(bool dropping) {
  const std::lock_guard<std::mutex> lock(lock_);
  closed_ = true;
  while (dropping && !line_.empty()) {
    drop(line_.front().ticket);
    line_.pop_front();
  }
  publish();
  wake_.notify_all();
  answered_.notify_all();
}

std::vector<Answered> ResidentLoop::take(double delay) {
  std::unique_lock<std::mutex> lock(lock_);
  delay_ += (delay - delay_) * (delay > delay_ ? kLonger : kShorter);
  const auto ready = [&] { return !out_.empty() || working_ == 0; };
  const auto pressing = [&] { return pressing_ || out_.size() >= kGathered || working_ == 0; };
  answered_.wait(lock, ready);
  if (const double rest = taken_ + kGather - steady_seconds(); rest > 0 && !pressing()) {
    gathering_ = true;
    answered_.wait_for(lock, std::chrono::duration<double>(rest), pressing);
    gathering_ = false;
  }
  taken_ = steady_seconds();
  pressing_ = false;
  return std::exchange(out_, {});
}

void ResidentLoop::work(Carrier& carrier) {
  give_way();
  std::vector<Row*> chosen;
  Row* last = nullptr;
  std::unique_lock<std::mutex> lock(lock_);
  while (true) {
    if (choose(kRanks, last, chosen)) {
      last = run(carrier, chosen, lock);
    } else if (closed_ && line_.empty() && static_cast<int64_t>(free_rows_.size()) == places_) {
      break;
    } else {
      ++idle_;
      wake_.wait(lock);
      --idle_;
      last = nullptr;
    }
  }
  --working_;
  wake_.notify_all();
  answered_.notify_all();
}

// A piece on rows that wait for it; one of those that go on. The lock is held before and after.
ResidentLoop::Row* ResidentLoop::run(Carrier& carrier, const std::vector<Row*>& chosen,
                                     std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  std::vector<Row*> rows = chosen;
  std::vector<Slot*> live;
  const int64_t p = rows.front()->piece;
  const Piece& piece = pieces_[p];
  const std::vector<Step>& body = network_.sections[piece.section].body;
  const double begin = steady_seconds();
  double others = 0;
  if (p == 0) {
    load(carrier, rows, live);
  } else {
    for (const Row* row : rows) live.push_back(row->slot);
  }
  for (int64_t i = piece.first; i < piece.last && !live.empty(); ++i) {
    carrier.run(body[i], live);
    if (p > 0 && i + 1 < piece.last) others += between(carrier, p, rows, live);
  }
  if (piece.leaves) {
    for (Slot* slot : live) carrier.enter(piece.section + 1, slot, rows_[slot->sample].next);
  }
  const double now = steady_seconds();
  lock.lock();
  return rows.empty() ? nullptr : finish(p, rows, now, now - begin - others);
}

void ResidentLoop::load(Carrier& carrier, std::vector<Row*>& rows, std::vector<Slot*>& live) {
  const Map& map = network_.maps[0];
  for (Row* row : rows) {
    Arrival& image = row->image;
    row->began = steady_seconds();
    std::copy_n(image.limits.get(), network_.num_exits, limits_.data() + row->place * network_.num_exits);
    exits_[row->place] = -1;
    if (carrier.load(image.pixels, image.bytes, {map.height * map.width, map.width, 1}, row->slot)) {
      live.push_back(row->slot);
    }
    image.memory.reset();
    image.limits.reset();
  }
}

// What comes first may go first; images that can wait no longer are answered. Seconds that others took.
double ResidentLoop::between(Carrier& carrier, int64_t p, std::vector<Row*>& rows, std::vector<Slot*>& live) {
  double until = kNever;
  if (pieces_[p].passed > 0) {
    for (const Row* row : rows) until = std::min(until, row->until - lag_of(*row));
  }
  if (const double now = until < kNever ? steady_seconds() : 0; until < now) {
    const std::lock_guard<std::mutex> lock(lock_);
    const auto late = [&](const Row& row) { return row.until - lag_of(row) < now; };
    std::erase_if(live, [&](const Slot* slot) { return late(rows_[slot->sample]); });
    const auto stay = std::stable_partition(rows.begin(), rows.end(), [&](const Row* row) { return !late(*row); });
    for (auto row = stay; row != rows.end(); ++row) answer_due(**row, (*row)->until, now);
    rows.erase(stay, rows.end());
    publish();
  }
  int64_t rank = pieces_[p].rank;
  if (rank_.load(std::memory_order_relaxed) >= rank && due_.load(std::memory_order_relaxed) == kNever) return 0;
  const double begin = steady_seconds();
  for (const Row* row : rows) rank = std::min(rank, rank_of(row->image, p, begin));
  if (rank_.load(std::memory_order_relaxed) >= rank && due_.load(std::memory_order_relaxed) >= begin) return 0;
  std::vector<Row*> chosen;
  Row* last = nullptr;
  std::unique_lock<std::mutex> lock(lock_);
  while (choose(rank, last, chosen)) last = run(carrier, chosen, lock);
  return steady_seconds() - begin;
}

// After a piece: those that exited are answered, the others wait for the next one; the last of them.
ResidentLoop::Row* ResidentLoop::finish(int64_t p, const std::vector<Row*>& rows, double now, double seconds) {
  Row* last = nullptr;
  const Piece& piece = pieces_[p];
  seconds_[p] += (seconds - seconds_[p]) / (seconds_[p] == 0 ? 1 : kRecent);
  const bool known = std::all_of(seconds_.begin(), seconds_.end(), [](double all) { return all > 0; });
  if (known) patience_.store(kPatience * std::accumulate(seconds_.begin(), seconds_.end(), 0.0));
  for (Row* row : rows) {
    if (row->cancelled || exits_[row->place] >= 0) {
      answer(*row, row->cancelled ? -1 : exits_[row->place], now);
      continue;
    }
    if (row->next != nullptr) {
      free_slots_[piece.section].push_back(row->slot);
      row->slot = std::exchange(row->next, nullptr);
    }
    const int64_t passed = pieces_[p + 1].passed;
    --under_way_[piece.passed];
    ++under_way_[passed];
    row->piece = p + 1;
    row->since = now;
    if (due(*row) - lag_of(*row) < now) {
      answer(*row, passed - 1, now);
    } else {
      waiting_[p + 1].push_back(row);
      last = row;
    }
  }
  publish();
  return last;
}

// When a row that waits must be answered: it cannot reach its next exit in time after that. Only after its first exit.
double ResidentLoop::due(const Row& row) const {
  if (row.until == kNever || pieces_[row.piece].passed == 0) return kNever;
  double seconds = 0;
  for (std::size_t p = row.piece; p < pieces_.size() && pieces_[p].passed == pieces_[row.piece].passed; ++p) {
    seconds += seconds_[p];
  }
  return row.until - seconds;
}

// Of an image before a piece.
int64_t ResidentLoop::rank_of(const Arrival& image, int64_t piece, double now) const {
  if (pieces_[piece].passed == 0 && image.deadline != kNever) return kUrgent;
  const bool old = image.arrived + patience_.load(std::memory_order_relaxed) < now;
  return old ? kDue : pieces_[piece].rank;
}

// Rows of a rank below this one that run together next; none where nothing of such a rank waits. last: the row that
// this worker ran last, with its maps in the cache, or null.
bool ResidentLoop::choose(int64_t rank, Row* last, std::vector<Row*>& chosen) {
  chosen.clear();
  const double now = steady_seconds();
  if (due_.load(std::memory_order_relaxed) < kNever) expire(now);
  const bool come = !line_.empty() && !free_rows_.empty(), rush = rushes();
  const auto group = [&](int64_t p) { return network_.sections[pieces_[p].section].group; };
  if (rush && last != nullptr && last->piece > 0 && group(last->piece) == 1 && pieces_[last->piece].rank < rank &&
      !waiting_[last->piece].empty() && waiting_[last->piece].back() == last) {
    waiting_[last->piece].pop_back();
    go(*last, chosen);
  } else {
    // In a rush groups that are not full wait for others; else those that are due come first, then early exits.
    std::pair<int64_t, int64_t> best{rank, 0};
    int64_t found = -1;
    for (std::size_t p = 0; p < pieces_.size(); ++p) {
      const auto count = static_cast<int64_t>(waiting_[p].size());
      if (p == 0 ? !come : count < (rush && come ? group(p) : 1)) continue;
      const Row* const first = p == 0 ? nullptr : waiting_[p].front();
      const int64_t number = p == 0 ? begun_ : first->number;
      const std::pair order{rush ? p == 0 ? kFinal : kArrivals : rank_of(p == 0 ? line_.front() : first->image, p, now),
                            number};
      if ((rush && p > 0 ? pieces_[p].rank : order.first) >= rank || (found >= 0 && order > best)) continue;
      best = order;
      found = static_cast<int64_t>(p);
    }
    if (found < 0) return false;
    if (found == 0) begin(chosen);
    std::deque<Row*>& next = waiting_[found];
    for (int64_t n = found == 0 ? 0 : together(next.size(), pieces_[found].section); n > 0; --n) {
      go(*next.front(), chosen);
      next.pop_front();
    }
  }
  publish();
  if (idle_ > 0 && rank_.load(std::memory_order_relaxed) < kRanks) wake_.notify_one();
  return true;
}

// A row that no longer waits.
void ResidentLoop::go(Row& row, std::vector<Row*>& chosen) {
  const Piece& piece = pieces_[row.piece];
  if (piece.leaves) row.next = slot(piece.section + 1, row);
  chosen.push_back(&row);
}

Slot* ResidentLoop::slot(int64_t section, const Row& row) {
  Slot* const found = free_slots_[section].back();
  free_slots_[section].pop_back();
  found->sample = row.place;
  return found;
}

// Whether many wait, and none of them has a deadline that the next one could miss.
bool ResidentLoop::rushes() const { return line_.size() > kRush * workers_ && line_.front().deadline == kNever; }

void ResidentLoop::begin(std::vector<Row*>& chosen) {
  int64_t n = std::min(together(line_.size(), 0), static_cast<int64_t>(free_rows_.size()));
  for (; n > 0; --n) {
    Row& row = *free_rows_.back();
    free_rows_.pop_back();
    row.image = std::move(line_.front());
    line_.pop_front();
    row.number = begun_++;
    row.piece = 0;
    row.cancelled = false;
    const double whole = row.image.deadline - row.image.arrived;
    row.until = whole == kNever ? kNever : row.image.deadline - std::min(delay_, kDelayShare * whole);
    row.slot = slot(0, row);
    row.next = nullptr;
    ++under_way_[0];
    go(row, chosen);
  }
}

void ResidentLoop::expire(double now) {
  if (now < due_.load(std::memory_order_relaxed)) return;
  for (std::size_t p = 1; p < waiting_.size(); ++p) {
    const auto late = [&](const Row* row) { return due(*row) - lag_of(*row) < now; };
    const auto stay = std::stable_partition(waiting_[p].begin(), waiting_[p].end(), std::not_fn(late));
    for (auto row = stay; row != waiting_[p].end(); ++row) answer_due(**row, due(**row), now);
    waiting_[p].erase(stay, waiting_[p].end());
  }
  publish();
}

// By the last exit that a row has passed, since it was due at that time; later ones are answered so much earlier. What
// was due before it came to wait says nothing about that.
void ResidentLoop::answer_due(Row& row, double at, double now) {
  const double late = std::max(now - std::max(at, row.since), 0.0), lag = lag_.load(std::memory_order_relaxed);
  lag_.store(lag + (late - lag) * (late > lag ? kLonger : kShorter), std::memory_order_relaxed);
  answer(row, pieces_[row.piece].passed - 1, now);
}

double ResidentLoop::lag_of(const Row& row) const {
  return std::min(lag_.load(std::memory_order_relaxed), kDelayShare * (row.image.deadline - row.image.arrived));
}

// By an exit that the row has passed, or -1; the row is free.
void ResidentLoop::answer(Row& row, int64_t exit, double now) {
  Answered found{row.image.ticket, 0, exit, 0, row.began, now, {}};
  if (exit >= 0) {
    const float* const logits = logits_.data() + row.place * network_.num_classes;
    found.logits.assign(logits, logits + network_.num_classes);
    found.confidence = confidence_[row.place];
    for (int64_t c = 1; c < network_.num_classes; ++c) {
      // As torch.argmax: a NaN is larger than all numbers.
      const float best = logits[found.label];
      if (!std::isnan(best) && (logits[c] > best || std::isnan(logits[c]))) found.label = c;
    }
  }
  out_.push_back(std::move(found));
  tell(row.until != kNever);
  const Piece& piece = pieces_[row.piece];
  --under_way_[piece.passed];
  free_slots_[piece.section].push_back(row.slot);
  if (row.next != nullptr) free_slots_[piece.section + 1].push_back(std::exchange(row.next, nullptr));
  row.slot = nullptr;
  row.piece = -1;
  free_rows_.push_back(&row);
  if (closed_ && line_.empty() && static_cast<int64_t>(free_rows_.size()) == places_) wake_.notify_all();
}

void ResidentLoop::drop(int64_t ticket) {
  out_.push_back({ticket, 0, -1, 0, 0, 0, {}});
  tell(false);
}

// urgent: whether the one who takes answers should not gather more of them.
void ResidentLoop::tell(bool urgent) {
  pressing_ |= urgent;
  if (!gathering_ || pressing_ || out_.size() >= kGathered) answered_.notify_one();
}

// What others read without the lock.
void ResidentLoop::publish() {
  const auto show = [&](int64_t i, int64_t n) {
    std::atomic_ref<int64_t>(counts_[i]).store(n, std::memory_order_relaxed);
  };
  show(0, static_cast<int64_t>(line_.size()));
  for (std::size_t i = 0; i < under_way_.size(); ++i) show(1 + static_cast<int64_t>(i), under_way_[i]);
  const bool rush = rushes();
  const double now = steady_seconds();
  int64_t rank = line_.empty() || free_rows_.empty() ? kRanks : rush ? kFinal : rank_of(line_.front(), 0, now);
  double first = kNever;
  for (std::size_t p = 1; p < waiting_.size(); ++p) {
    if (waiting_[p].empty()) continue;
    rank = std::min(rank, rush ? pieces_[p].rank : rank_of(waiting_[p].front()->image, p, now));
    for (const Row* row : waiting_[p]) first = std::min(first, due(*row) - lag_of(*row));
  }
  rank_.store(rank, std::memory_order_relaxed);
  due_.store(first, std::memory_order_relaxed);
}

// Images of a call: as many as the section takes, while others leave some to the other workers.
int64_t ResidentLoop::together(std::size_t waiting, int64_t section) const {
  return std::min(network_.sections[section].group, (static_cast<int64_t>(waiting) + workers_ - 1) / workers_);
}

}  // namespace eefast::cpu
