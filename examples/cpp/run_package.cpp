// Images → classes and exits, by what `eefast export NETWORK OUT --format aoti` wrote: run_package OUT IMAGES [ROUNDS]
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>

template <typename T>
std::vector<T> numbers(std::istringstream text) {
  std::vector<T> found;
  for (std::string word; text >> word;) found.push_back(static_cast<T>(std::strtod(word.c_str(), nullptr)));
  return found;
}

int main(int argc, char** argv) {
  const std::string folder = argv[1];
  if (dlopen((folder + "/libeefast.so").c_str(), RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader package(folder + "/network.pt2");
  auto known = package.get_metadata();
  std::vector<c10::IValue> here;
  c10::Dispatcher::singleton().findSchemaOrThrow(known["instruction_set_op"].c_str(), "").callBoxed(here);
  if (here[0].toStringRef() != known["instruction_set"]) {
    std::cerr << "exported for " << known["instruction_set"] << ", here is " << here[0].toStringRef() << "\n";
    return 2;
  }
  // IMAGES: float32 numbers without a header, normalised, N × C × H × W of them.
  std::ifstream file(argv[2], std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  auto shape = numbers<int64_t>(std::istringstream("-1 " + known["input_shape"]));
  auto images = at::from_blob(bytes.data(), {static_cast<int64_t>(bytes.size() / 4)}).view(shape);
  auto limits = numbers<float>(std::istringstream(known["thresholds"]));
  auto thresholds = at::from_blob(limits.data(), {static_cast<int64_t>(limits.size())});
  auto answers = package.run({images, thresholds});
  auto classes = answers[0].argmax(1);
  for (int64_t i = 0; i < images.size(0); ++i) {
    std::cout << classes[i].item<int64_t>() << " " << answers[2][i].item<int64_t>() << "\n";
  }
  for (int round = 0; argc > 3 && round < std::stoi(argv[3]); ++round) {
    const auto begin = std::chrono::steady_clock::now();
    package.run({images, thresholds});
    std::cerr << std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() << "\n";
  }
}
