// Images that come one by one → their answers, each as soon as its image exits.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/resident.h"
#include "program.h"

namespace eefast::cpu {

// pixels: [C, H, W], float32 or uint8, dense, in `memory`. limits: of the early exits, as of `Batch` with thresholds of
// each. arrived, deadline: seconds of the steady clock; without a deadline infinite.
struct Arrival {
  int64_t ticket;
  std::shared_ptr<const char[]> memory;
  const void* pixels;
  bool bytes;
  std::shared_ptr<const float[]> limits;
  double arrived, deadline;
};

// exit: -1 for an image that was cancelled or dropped; then the rest has no meaning. began, ended: seconds.
struct Answered {
  int64_t ticket, label, exit;
  float confidence;
  double began, ended;
  std::vector<float> logits;
};

double steady_seconds();

// Threads that carry images to their exits, and choose between any two steps of the network which images go on: first
// those that are there for twice as long as an image takes, then those that have just come, to their first exit, then
// those before another early exit, then those before the final one; among these the oldest one, with others that wait
// for the same steps. A deadline makes an image exit at the last exit that it reaches in time, at the first one in any
// case; to its first exit it goes before all others.
class ResidentLoop {
 public:
  // scaling, rule: see `Batch`, kept here. counts: [2 + exits] numbers that are kept up to date: of images that wait,
  // then of those that have begun, by the number of exits that they have passed.
  ResidentLoop(const Network& network, std::vector<float> scaling, std::vector<float> rule, int64_t workers,
               int64_t* counts);
  // Images that have not begun are never answered.
  ~ResidentLoop();

  // False where the loop is closed.
  bool put(std::vector<Arrival> arrivals);
  // It is computed no further, and comes out of `take` with exit -1, unless it has its answer.
  void cancel(int64_t ticket);
  // No more images; those that wait are answered or, with `drop`, come out of `take` with exit -1.
  void close(bool drop);
  // Waits for answers, shortly for more of them where it took some just before and none of them has a deadline; those
  // that there are now, none when the loop is closed and all are taken. delay: seconds that
  // lately passed from an answer to the one who waits for it, which deadlines take into account.
  std::vector<Answered> take(double delay);

 private:
  // Steps [first, last) of a section's body; they end after an exit, or with the section: then images enter the next.
  struct Piece {
    int64_t section, first, last, passed;  // exits before it
    int64_t rank;
    bool leaves;
  };
  struct Row {
    Arrival image;
    int64_t number, piece, place;
    double began, until;  // when it must be answered
    double since;         // when it passed its last exit, or came to the next piece
    bool cancelled;
    Slot* slot;
    Slot* next;  // where the piece leaves its section
  };

  void work(Carrier& carrier);
  Row* run(Carrier& carrier, const std::vector<Row*>& chosen, std::unique_lock<std::mutex>& lock);
  void load(Carrier& carrier, std::vector<Row*>& rows, std::vector<Slot*>& live);
  double between(Carrier& carrier, int64_t piece, std::vector<Row*>& rows, std::vector<Slot*>& live);
  Row* finish(int64_t piece, const std::vector<Row*>& rows, double now, double seconds);
  int64_t rank_of(const Arrival& image, int64_t piece, double now) const;
  bool choose(int64_t rank, Row* last, std::vector<Row*>& chosen);
  void go(Row& row, std::vector<Row*>& chosen);
  bool rushes() const;
  Slot* slot(int64_t section, const Row& row);
  void begin(std::vector<Row*>& chosen);
  void expire(double now);
  double due(const Row& row) const;
  void answer_due(Row& row, double at, double now);
  double lag_of(const Row& row) const;
  void answer(Row& row, int64_t exit, double now);
  void drop(int64_t ticket);
  void tell(bool urgent);
  void publish();
  int64_t together(std::size_t waiting, int64_t section) const;

  const Network& network_;
  const std::vector<float> scaling_, rule_;
  const int64_t workers_;
  int64_t* const counts_;
  std::vector<Piece> pieces_;
  int64_t places_;
  std::vector<float> limits_, logits_, confidence_;
  std::vector<int64_t> exits_;
  std::vector<std::unique_ptr<Carrier>> carriers_;
  std::vector<Row> rows_;

  // Guards all below.
  std::mutex lock_;
  std::condition_variable wake_, answered_;
  std::deque<Arrival> line_;
  std::vector<std::deque<Row*>> waiting_;
  std::vector<Row*> free_rows_;
  std::vector<std::vector<Slot*>> free_slots_;
  std::vector<Answered> out_;
  std::vector<int64_t> under_way_;  // by exits passed
  std::vector<double> seconds_;     // of every piece, lately
  int64_t begun_ = 0, working_ = 0, idle_ = 0;
  double delay_ = 0, taken_ = 0;
  bool closed_ = false, gathering_ = false, pressing_ = false;

  // Read between steps: the lowest rank of what could run now, when the first image that waits must be answered, and
  // the seconds after which an image is due.
  std::atomic<int64_t> rank_;
  std::atomic<double> due_, patience_;
  std::atomic<double> lag_ = 0;  // seconds that images were lately answered after they were due
  std::vector<std::thread> threads_;
};

}  // namespace eefast::cpu
