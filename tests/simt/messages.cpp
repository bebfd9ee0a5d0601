// A message from one block to another on the CPU, with a C interface for tests/ops/test_simt_stores.py.
#include "cuda/simt.h"

namespace {

struct Mail {
  int text[64], sent, received[64];
};

void send_and_receive(Mail* mail) {
  const int i = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0) {
    mail->text[i] = i + 1;
    __syncthreads();  // the text is complete
    if (i == 0) {
      __threadfence();  // the text is to be seen before the mark
      atomicAdd(&mail->sent, 1);
    }
    return;
  }
  for (bool there = false; !there;) there = __shfl_sync(~0u, i == 0 && atomicAdd(&mail->sent, 0) == 1, 0) || i >= 32;
  if (i == 0) __threadfence();  // the text is to be seen after the mark
  __syncthreads();              // it has been sent
  mail->received[i] = mail->text[i];
}

}  // namespace

extern "C" const char* messages(Mail* mail, unsigned order, int dropped, bool delayed) {
  simt::Options options{2, 64, 0, order, dropped};
  if (delayed) options.delayed = {{mail->text, sizeof mail->text}, {&mail->sent, sizeof mail->sent}};
  return simt::launch(options, [=] { send_and_receive(mail); });
}
