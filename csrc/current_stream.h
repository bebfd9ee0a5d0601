// The stream on which PyTorch queues work of a CUDA device now.
#pragma once

#include <cstdint>

namespace eefast {

void* current_stream(int32_t device);

}  // namespace eefast
