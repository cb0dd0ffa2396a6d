// Runs a package of `prequant export DIR --format aoti` on one text, without Python:
//
//   run_package MODEL.pt2 [--repeat N] ID...
//
// The ids of the text's tokens go in as a batch of one; what comes out is printed. With --repeat, N more calls are
// timed. Threads are as many as OMP_NUM_THREADS says.

#include <ATen/ops/full_like.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

int64_t whole_number(const std::string &text) {
    size_t read = 0;
    int64_t number = -1;
    try {
        number = std::stoll(text, &read);
    } catch (const std::logic_error &) {
    }
    if (number < 0 || read != text.size()) throw std::runtime_error("'" + text + "' is not a whole number");
    return number;
}

std::vector<std::string> lines(const std::string &text) {
    std::vector<std::string> found;
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) found.push_back(line);
    return found;
}

// The value of an input that the package describes as "input_ids int64 [batch, length]".
at::Tensor input_value(const std::string &described, const std::vector<int64_t> &ids) {
    std::string name, type;
    std::istringstream(described) >> name >> type;
    const at::Tensor text = at::tensor(ids, at::kLong).unsqueeze(0);
    if (type == "int64" && name == "input_ids") return text;
    if (type == "int64" && name == "attention_mask") return at::full_like(text, 1);
    if (type == "int64" && name == "token_type_ids") return at::full_like(text, 0);
    throw std::runtime_error("the package takes an input '" + described + "', which this example has no value for");
}

void print(const std::string &name, const at::Tensor &tensor) {
    const at::Tensor values = tensor.to(at::kFloat).contiguous().view(-1);
    const int64_t shown = std::min<int64_t>(values.numel(), 8);
    std::ostringstream shape;
    shape << tensor.sizes();
    std::printf("%s %s:", name.c_str(), shape.str().c_str());
    for (int64_t i = 0; i < shown; ++i) std::printf(" %.8g", values[i].item<float>());
    std::puts(shown < values.numel() ? " ..." : "");
}

void run(const std::vector<std::string> &words) {
    std::vector<int64_t> ids;
    int64_t repeat = 0;
    for (size_t i = 1; i < words.size(); ++i) {
        if (words[i] == "--repeat") {
            if (++i == words.size()) throw std::runtime_error("--repeat wants a number of calls");
            repeat = whole_number(words[i]);
        } else {
            ids.push_back(whole_number(words[i]));
        }
    }
    if (ids.empty()) throw std::runtime_error("usage: run_package MODEL.pt2 [--repeat N] ID...");

    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader package(words[0]);
    auto metadata = package.get_metadata();
    std::vector<at::Tensor> inputs;
    for (const std::string &line : lines(metadata["prequant.inputs"])) inputs.push_back(input_value(line, ids));
    if (inputs.empty()) throw std::runtime_error(words[0] + " does not say what it takes: export it with prequant");

    const std::vector<std::string> names = lines(metadata["prequant.outputs"]);
    const std::vector<at::Tensor> outputs = package.run(inputs);
    for (size_t i = 0; i < outputs.size(); ++i) print(names.at(i), outputs[i]);

    std::vector<double> times;
    for (int64_t call = 0; call < repeat; ++call) {
        const auto start = std::chrono::steady_clock::now();
        package.run(inputs);
        times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    if (times.empty()) return;
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    const double median = times[times.size() / 2];
    std::printf("%.3f ms a call (median of %zu), %.0f calls a second\n", 1e3 * median, times.size(), 1 / median);
}

}  // namespace

int main(int count, char **words) {
    try {
        run(std::vector<std::string>(words + 1, words + count));
    } catch (const std::exception &error) {
        const std::string said = error.what();  // by torch: the reason, and then lines of where it was found
        std::fprintf(stderr, "run_package: %s\n", said.substr(0, said.find('\n')).c_str());
        return 1;
    }
    return 0;
}
