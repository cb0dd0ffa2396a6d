#include "panels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "memory.h"
#include "native.h"

namespace prequant_torch {

namespace {

// A tensor's numbers, as they are now: after a change they are others. Memory that was given back is not mistaken for
// what takes its place: the storage's own record is kept, though not its bytes.
class State {
public:
    explicit State(const OptionalTensor &tensor) {
        if (!tensor) return;
        storage_ = tensor->storage().getWeakStorageImpl();
        data_ = tensor->const_data_ptr();
        // Tensors made in inference mode do not count their changes.
        version_ = tensor->is_inference() ? 0 : tensor->_version();
        sizes_ = tensor->sizes().vec();
        strides_ = tensor->strides().vec();
        type_ = tensor->scalar_type();
    }

    bool gone() const { return data_ && storage_.expired(); }

    // Whether it is in the same memory, whatever that holds now.
    bool lies_where(const OptionalTensor &tensor) const {
        if (!tensor) return !data_;
        return data_ == tensor->const_data_ptr() && storage_._unsafe_get_target() == record(*tensor);
    }

    bool is(const OptionalTensor &tensor) const {
        if (!tensor) return !data_;
        return lies_where(tensor) &&
               version_ == (tensor->is_inference() ? 0 : tensor->_version()) && type_ == tensor->scalar_type() &&
               tensor->sizes() == sizes_ && tensor->strides() == strides_;
    }

    static c10::StorageImpl *record(const Tensor &tensor) { return tensor.storage().unsafeGetStorageImpl(); }

private:
    // Null: there is no tensor.
    c10::weak_intrusive_ptr<c10::StorageImpl> storage_{c10::intrusive_ptr<c10::StorageImpl>()};
    const void *data_ = nullptr;
    uint32_t version_ = 0;
    std::vector<int64_t> sizes_, strides_;
    at::ScalarType type_ = at::kByte;
};

// Scales, and all else that is packed for codes: several tasks may have their own.
struct Scales {
    State scale, zero_point, values, columns, row_offsets;
    bool replace;
    std::shared_ptr<const void> memory;

    explicit Scales(const Weight &weight)
        : scale(weight.scale),
          zero_point(weight.zero_point),
          values(part(weight, &Outliers::values)),
          columns(part(weight, &Outliers::columns)),
          row_offsets(part(weight, &Outliers::row_offsets)),
          replace(weight.outliers && weight.outliers->replace) {}

    bool gone() const {
        return scale.gone() || zero_point.gone() || values.gone() || columns.gone() || row_offsets.gone();
    }

    // Whether it was made of the same memory.
    bool lies_where(const Weight &weight) const {
        return scale.lies_where(weight.scale) && zero_point.lies_where(weight.zero_point) &&
               values.lies_where(part(weight, &Outliers::values)) &&
               columns.lies_where(part(weight, &Outliers::columns)) &&
               row_offsets.lies_where(part(weight, &Outliers::row_offsets)) &&
               replace == (weight.outliers && weight.outliers->replace);
    }

    bool are(const Weight &weight) const {
        return scale.is(weight.scale) && zero_point.is(weight.zero_point) &&
               values.is(part(weight, &Outliers::values)) && columns.is(part(weight, &Outliers::columns)) &&
               row_offsets.is(part(weight, &Outliers::row_offsets)) &&
               replace == (weight.outliers && weight.outliers->replace);
    }

    static OptionalTensor part(const Weight &weight, Tensor Outliers::*which) {
        return weight.outliers ? OptionalTensor((*weight.outliers).*which) : std::nullopt;
    }
};

struct Codes {
    State state;
    std::string format;
    int64_t columns;
    std::shared_ptr<const void> memory;
    std::list<Scales> scales;

    bool are(const Weight &weight, const std::string &text) const {
        return state.is(weight.codes) && columns == weight.columns && format == text;
    }
};

class Packed {
public:
    Panels of(const char *op, const Weight &weight) {
        const std::lock_guard<std::mutex> guard(mutex_);
        const std::string text = weight.format.text();
        Codes *codes = find(weight, text);
        if (!codes) codes = pack_codes(op, weight, text);
        for (const Scales &each : codes->scales) {
            if (each.are(weight)) return {codes->memory, each.memory};
        }
        return {codes->memory, pack_scales(op, weight, *codes)};
    }

private:
    Codes *find(const Weight &weight, const std::string &text) {
        const auto [first, last] = codes_.equal_range(weight.codes.const_data_ptr());
        const auto found = std::find_if(first, last, [&](const auto &each) { return each.second.are(weight, text); });
        return found == last ? nullptr : &found->second;
    }

    Codes *pack_codes(const char *op, const Weight &weight, const std::string &text) {
        // What went, or was written to, is looked for where something new comes: seldom.
        for (auto each = codes_.begin(); each != codes_.end();) {
            const State &state = each->second.state;
            const bool overwritten = each->first == weight.codes.const_data_ptr() && !state.is(weight.codes);
            each = state.gone() || overwritten ? codes_.erase(each) : std::next(each);
        }
        const native::NeutralWeight neutral(weight);
        const int64_t size = prequant_codes_bytes(neutral.get());
        native::check(op, size < 0 ? PREQUANT_BAD_WEIGHT : PREQUANT_OK, weight);
        const auto memory = pool_.take(size);
        native::check(op, prequant_pack_codes(neutral.get(), memory.get(), at::get_num_threads()), weight);
        const auto made = codes_.emplace(weight.codes.const_data_ptr(),
                                         Codes{State(weight.codes), text, weight.columns, memory, {}});
        return &made->second;
    }

    std::shared_ptr<const void> pack_scales(const char *op, const Weight &weight, Codes &codes) {
        // What went, or was written to since.
        codes.scales.remove_if([&](const Scales &each) { return each.gone() || each.lies_where(weight); });
        const native::NeutralWeight neutral(weight);
        const int64_t size = prequant_scales_bytes(neutral.get());
        native::check(op, size < 0 ? PREQUANT_BAD_WEIGHT : PREQUANT_OK, weight);
        Scales made(weight);
        const auto memory = pool_.take(size);
        const int threads = at::get_num_threads();
        native::check(op, prequant_pack_scales(neutral.get(), codes.memory.get(), memory.get(), threads), weight);
        made.memory = memory;
        codes.scales.push_back(std::move(made));
        return memory;
    }

    std::mutex mutex_;
    Pool pool_;
    std::unordered_multimap<const void *, Codes> codes_;  // by where the codes are
};

}  // namespace

Panels panels_of(const char *op, const Weight &weight) {
    // Never destroyed: a package may run until the process ends, when the order in which libraries go is not known.
    static Packed &packed = *new Packed;
    return packed.of(op, weight);
}

}  // namespace prequant_torch
