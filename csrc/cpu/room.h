// Memory that the kernels work in, and the error where there is none.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace eefast::cpu {

// Not std::bad_alloc, which says nothing.
inline std::runtime_error no_memory(const char* what, int64_t bytes) {
  return std::runtime_error("no memory could be had for " + std::string(what) + ", " + std::to_string(bytes) +
                            " bytes for each thread; use fewer threads, a smaller batch or smaller images");
}

template <class T>
std::vector<T> room(const char* what, int64_t n) {
  try {
    return std::vector<T>(n);
  } catch (const std::exception&) {
    throw no_memory(what, n * static_cast<int64_t>(sizeof(T)));
  }
}

}  // namespace eefast::cpu
