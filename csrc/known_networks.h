// Keeps the networks that were read last, which for one image takes as long as a few layers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <iterator>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "resident_program.h"

namespace eefast {

// Each keeps its packed weights, so that no others can get their addresses. The process owns them, not a thread:
// the last owner of a tensor waits for Python, and a thread may end while Python does. For the same reason they are
// never destroyed.
template <class Network>
class KnownNetworks {
 public:
  using Known = std::pair<ResidentSource, Network>;

  // read(source) makes the network of a source that is not known.
  template <class Read>
  std::shared_ptr<const Known> of(ResidentSource source, const Read& read) {
    static thread_local std::weak_ptr<const Known> last;
    if (std::shared_ptr<const Known> known = last.lock(); known && known->first == source) return known;
    std::shared_ptr<const Known> known = kept(source);
    if (!known) {
      Network network = read(source);
      known = keep(std::make_shared<const Known>(std::move(source), std::move(network)));
    }
    last = known;
    return known;
  }

 private:
  // Programs that share their weights, the parts of one network, count as one of kMostWeights.
  static constexpr std::size_t kMost = 64, kMostWeights = 4;

  std::shared_ptr<const Known> kept(const ResidentSource& source) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& known : networks_) {
      if (known->first == source) return known;
    }
    return nullptr;
  }

  std::shared_ptr<const Known> keep(std::shared_ptr<const Known> known) {
    std::deque<std::shared_ptr<const Known>> dropped;  // destroyed after the lock, since that may wait for Python
    const std::lock_guard<std::mutex> lock(mutex_);
    networks_.push_front(known);
    std::vector<const float*> weights;  // of the networks that were read last
    auto end = networks_.begin();
    for (; end != networks_.end() && end - networks_.begin() < static_cast<std::ptrdiff_t>(kMost); ++end) {
      const float* const place = (*end)->first.place;
      if (std::find(weights.begin(), weights.end(), place) != weights.end()) continue;
      if (weights.size() == kMostWeights) break;
      weights.push_back(place);
    }
    dropped.insert(dropped.end(), std::make_move_iterator(end), std::make_move_iterator(networks_.end()));
    networks_.erase(end, networks_.end());
    return known;
  }

  std::mutex mutex_;
  std::deque<std::shared_ptr<const Known>> networks_;
};

template <class Network>
KnownNetworks<Network>& known_networks() {
  static auto& networks = *new KnownNetworks<Network>;
  return networks;
}

}  // namespace eefast
