// The work list of a step over torch tensors.
#include "torch_listing.hpp"

#include <algorithm>

#include "arrays.hpp"

namespace sgdcore::bindings {
namespace {

bool same_shape(const TorchView& a, const TorchView& b) {
    return a.dimensions == b.dimensions && std::equal(a.shape, a.shape + a.dimensions, b.shape);
}

/// True if two tensors of one shape have the same strides, except where an axis has length 1.
bool same_strides(const TorchView& a, const TorchView& b) {
    for (int axis = 0; axis < a.dimensions; ++axis) {
        if (a.strides[axis] != b.strides[axis] && a.shape[axis] != 1) return false;
    }
    return true;
}

/// True if the gradient may be a negated view, whose elements have the opposite sign of its memory: the imaginary part
/// of a conjugate, which DLPack does not tell. Such a view has gaps between its elements, if there are several, so only
/// gradients with gaps are asked. Parameters and states are asked when they are first read.
bool may_be_negated(const TorchView& param, const TorchView& grad, std::int64_t size) {
    return size == 1 || (size > 0 && !same_strides(param, grad));
}

Extent grad_extent(const TensorRef& tensor) {
    const auto item = static_cast<std::int64_t>(item_size(tensor.grad_dtype));
    std::int64_t reach = item;  // from the first element to behind the last
    for (const Axis& axis : tensor.grad_axes) reach += (axis.length - 1) * axis.stride;
    if (tensor.grad_axes.empty()) reach = tensor.size * item;
    return extent_at(tensor.grad, static_cast<std::uintptr_t>(reach));
}

}  // namespace

bool memory_order(const TorchView& view, int* order) {
    for (int axis = 0; axis < view.dimensions; ++axis) order[axis] = axis;
    std::sort(order, order + view.dimensions, [&](int a, int b) {
        // An axis of length 1 may have any stride. As the slowest axis it has no effect.
        const auto rank = [&](int axis) { return view.shape[axis] == 1 ? INT64_MAX : view.strides[axis]; };
        return rank(a) != rank(b) ? rank(a) > rank(b) : a < b;
    });
    std::int64_t expected = 1;
    for (int i = view.dimensions; i-- > 0;) {
        if (view.shape[order[i]] == 1) continue;
        if (view.strides[order[i]] != expected) return false;
        expected *= view.shape[order[i]];
    }
    return true;
}

std::int64_t size_of(const TorchView& view) {
    std::int64_t size = 1;
    for (int axis = 0; axis < view.dimensions; ++axis) size *= view.shape[axis];
    return size;
}

void TorchListing::start() {
    if (!complete_) truncate(0);
    complete_ = false;
    next_ = 0;
    relisted_ = moved_writes_ = tensors_.empty();
    moved_grads_.clear();
}

TorchListing::Answer TorchListing::add(const TorchReader& reader, std::size_t position, PyObject* grad,
                                       const TorchOperands& operands, std::uint32_t group, bool first_step) {
    if (next_ < tensors_.size()) {
        const Source& source = sources_[next_];
        if (source.position == position && tensors_[next_].hyper == group && matches(next_, operands)) {
            if (source.may_be_negated && reader.is_negated(grad)) return Answer::refused;
            tensors_[next_].first_step = first_step;
            return update(next_, operands);
        }
    }
    if (operands.in_use != 0 && !operands.states_are_read) return Answer::read_states;
    truncate(next_);
    return append(reader, position, grad, operands, group, first_step);
}

/// True if the operands differ from the list's entry in nothing but addresses.
bool TorchListing::matches(std::size_t index, const TorchOperands& operands) const {
    const Source& source = sources_[index];
    const TensorRef& tensor = tensors_[index];
    const TorchView &p = operands.param, &g = operands.grad;
    if (p.dtype != tensor.param_dtype || g.dtype != tensor.grad_dtype || p.dimensions != source.dimensions ||
        g.dimensions != source.dimensions || operands.in_use != source.in_use) {
        return false;
    }
    if (p.device != tensor.device || g.device != tensor.device) return false;
    const std::int64_t *shape = layouts_.data() + source.layout, *strides = shape + source.dimensions,
                       *grad_strides = strides + source.dimensions;
    for (int axis = 0; axis < source.dimensions; ++axis) {
        if (p.shape[axis] != shape[axis] || g.shape[axis] != shape[axis] || p.strides[axis] != strides[axis] ||
            g.strides[axis] != grad_strides[axis]) {
            return false;
        }
    }
    if (!operands.states_are_read) return true;
    bool same = true;
    operands.for_each_state([&](int state) {
        const TorchView& s = operands.states[state];
        same = same && s.dtype == tensor.state_dtypes[state] && s.device == tensor.device &&
               s.dimensions == source.dimensions && std::equal(shape, strides, s.shape) &&
               std::equal(strides, grad_strides, s.strides);
    });
    return same;
}

/// Takes over the operands' addresses.
TorchListing::Answer TorchListing::update(std::size_t index, const TorchOperands& operands) {
    TensorRef& tensor = tensors_[index];
    const TorchView &p = operands.param, &g = operands.grad;
    if (tensor.size > 0 && (p.data == nullptr || g.data == nullptr)) return Answer::refused;
    if (p.data != tensor.param) {
        tensor.param = p.data;
        moved_writes_ = true;
    }
    if (operands.states_are_read) {
        operands.for_each_state([&](int state) {
            if (operands.states[state].data == tensor.states[state]) return;
            tensor.states[state] = operands.states[state].data;
            moved_writes_ = true;
        });
    }
    if (g.data != tensor.grad) {
        tensor.grad = g.data;
        moved_grads_.push_back(index);
    }
    ++next_;
    return Answer::listed;
}

bool TorchListing::takes(const TorchReader& reader, PyObject* grad, const TorchOperands& operands) const {
    const TorchView &p = operands.param, &g = operands.grad;
    if (!same_shape(p, g) || p.device != g.device) return false;
    const std::int64_t size = size_of(p);
    if (size > 0 && (p.data == nullptr || g.data == nullptr)) return false;
    int order[max_dimensions];
    if (size > 0 && !memory_order(p, order)) return false;
    return !(may_be_negated(p, g, size) && reader.is_negated(grad));
}

TorchListing::Answer TorchListing::append(const TorchReader& reader, std::size_t position, PyObject* grad,
                                          const TorchOperands& operands, std::uint32_t group, bool first_step) {
    const TorchView &p = operands.param, &g = operands.grad;
    if (!same_shape(p, g) || p.device != g.device) return Answer::refused;
    TensorRef tensor;
    bool fits = true;
    operands.for_each_state([&](int state) {
        const TorchView& s = operands.states[state];
        fits = fits && same_shape(p, s) && same_strides(p, s) && p.device == s.device;
        tensor.states[state] = s.data;
        tensor.state_dtypes[state] = s.dtype;
    });
    if (!fits) return Answer::refused;
    tensor.param = p.data;
    tensor.param_dtype = p.dtype;
    tensor.grad = g.data;
    tensor.grad_dtype = g.dtype;
    tensor.size = size_of(p);
    tensor.hyper = group;
    tensor.device = p.device;
    tensor.first_step = first_step;
    if (tensor.size > 0 && (p.data == nullptr || g.data == nullptr)) return Answer::refused;
    const bool ask = may_be_negated(p, g, tensor.size);
    if (ask && reader.is_negated(grad)) return Answer::refused;
    const bool reordered = tensor.size > 0 && !same_strides(p, g);
    int order[max_dimensions];
    if (tensor.size > 0 && !memory_order(p, order)) return Answer::refused;
    const std::size_t axes_start = axes_.size();
    if (reordered) {
        const auto item = static_cast<std::int64_t>(item_size(g.dtype));
        for (int i = 0; i < p.dimensions; ++i) {
            if (g.shape[order[i]] == 1) continue;
            append_axis(axes_, axes_start, {g.shape[order[i]], g.strides[order[i]] * item});
        }
    }
    sources_.push_back({position, layouts_.size(), axes_.size(), p.dimensions, operands.in_use, ask, p.shape, g.shape});
    for (const std::int64_t* part : {p.shape, p.strides, g.strides}) {
        layouts_.insert(layouts_.end(), part, part + p.dimensions);
    }
    tensors_.push_back(tensor);
    elements_ += tensor.size;
    relisted_ = moved_writes_ = true;
    ++next_;
    return Answer::listed;
}

void TorchListing::index_axes(std::size_t index, std::vector<Axis>& axes) const {
    axes.clear();
    const Source& source = sources_[index];
    TorchView view;
    view.dimensions = source.dimensions;
    view.shape = layouts_.data() + source.layout;
    view.strides = view.shape + source.dimensions;
    if (tensors_[index].size <= 1 || in_c_order(view)) return;
    std::int64_t distances[max_dimensions], distance = 1;
    for (int axis = view.dimensions; axis-- > 0; distance *= view.shape[axis]) distances[axis] = distance;
    int order[max_dimensions];
    memory_order(view, order);
    for (int i = 0; i < view.dimensions; ++i) {
        if (view.shape[order[i]] != 1) append_axis(axes, 0, {view.shape[order[i]], distances[order[i]]});
    }
}

std::optional<TensorRef> average_of(const TorchOperands& operands, std::uint32_t group) {
    const TorchView &p = operands.param, &average = operands.states[average_slot];
    TensorRef tensor;
    tensor.size = size_of(p);
    int order[max_dimensions];
    if (!same_shape(p, average) || !same_strides(p, average) || p.device != average.device ||
        (tensor.size > 0 && (p.data == nullptr || average.data == nullptr || !memory_order(p, order)))) {
        return std::nullopt;
    }
    tensor.param = p.data;
    tensor.param_dtype = p.dtype;
    tensor.states[average_slot] = average.data;
    tensor.state_dtypes[average_slot] = average.dtype;
    tensor.hyper = group;
    tensor.device = p.device;
    return tensor;
}

void TorchListing::prefetch() const {
    constexpr std::size_t ahead = 2;
    if (next_ + ahead >= tensors_.size()) return;
    const TensorRef& tensor = tensors_[next_ + ahead];
    const Source& source = sources_[next_ + ahead];
    for (const void* header : {source.param_header, source.grad_header}) {
        const auto* const bytes = static_cast<const std::byte*>(header);
        __builtin_prefetch(bytes - cache_line);
        __builtin_prefetch(bytes);
        __builtin_prefetch(bytes + cache_line);
    }
    for (const std::byte* data : {tensor.param, tensor.grad, tensor.states[0]}) __builtin_prefetch(data);
}

void TorchListing::truncate(std::size_t count) {
    if (count == tensors_.size()) return;
    for (std::size_t i = count; i < tensors_.size(); ++i) elements_ -= tensors_[i].size;
    layouts_.resize(sources_[count].layout);
    axes_.resize(count == 0 ? 0 : sources_[count - 1].axes);
    tensors_.resize(count);
    sources_.resize(count);
    relisted_ = moved_writes_ = true;
}

void TorchListing::finish() {
    truncate(next_);
    if (relisted_) {
        on_device_ = std::ranges::any_of(tensors_, [](const TensorRef& t) { return t.device != cpu_device; });
        std::size_t start = 0;
        for (std::size_t i = 0; i < tensors_.size(); ++i) {
            tensors_[i].grad_axes = {axes_.data() + start, sources_[i].axes - start};
            start = sources_[i].axes;
        }
    }
    if (relisted_ || !moved_grads_.empty()) disjoint_grads_ = false;
    if (!is_disjoint()) {
        std::vector<Claim> all = claims();
        std::vector<bool> marked(tensors_.size());
        mark_conflicts(all, marked);
        for (std::size_t i = 0; i < marked.size(); ++i) {
            if (marked[i]) overlapping_.push_back(i);
        }
    }
    complete_ = true;
}

template <class Function>
void TorchListing::for_each_write(std::size_t index, Function&& function) const {
    const TensorRef& tensor = tensors_[index];
    const auto extent = [&](const std::byte* data, DType dtype) {
        return extent_at(data, static_cast<std::uintptr_t>(tensor.size) * item_size(dtype));
    };
    function(extent(tensor.param, tensor.param_dtype));
    for_each_state(sources_[index].in_use,
                   [&](int state) { function(extent(tensor.states[state], tensor.state_dtypes[state])); });
}

/// True if no tensors overlap. Compares only memory that has moved; false may mean that it is not known.
bool TorchListing::is_disjoint() {
    const bool again = !overlapping_.empty();  // tensors that moved may overlap no longer
    if (!moved_writes_ && moved_grads_.empty()) return true;
    if (moved_writes_ || again) {
        overlapping_.clear();
        return writes_are_disjoint() &&
               std::ranges::all_of(tensors_, [&](const TensorRef& tensor) { return apart_from_writes(tensor); });
    }
    return std::ranges::all_of(moved_grads_, [&](std::size_t index) { return apart_from_writes(tensors_[index]); });
}

bool TorchListing::can_step_in_sequence() const {
    return std::ranges::all_of(overlapping_, [&](std::size_t index) {
        const TensorRef& tensor = tensors_[index];
        std::vector<Extent> writes;
        for_each_write(index, [&](const Extent& extent) { writes.push_back(extent); });
        sort_by_address(writes);
        if (find_overlap(writes) != writes.end()) return false;
        return tensor.device == cpu_device && (tensor.grad_axes.empty() || !is_own_gradient(index));
    });
}

bool TorchListing::is_own_gradient(std::size_t index) const {
    const Extent grad = grad_extent(tensors_[index]);
    bool found = false;
    for_each_write(index, [&](const Extent& extent) { found = found || overlap(grad, extent); });
    return found;
}

bool TorchListing::can_clear() {
    if (!disjoint_grads_) disjoint_grads_ = grads_are_disjoint();
    return disjoint_grads_;
}

std::vector<Claim> TorchListing::claims() const {
    std::vector<Claim> claims;
    claims.reserve(3 * tensors_.size());
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        const TensorRef& tensor = tensors_[i];
        if (tensor.size == 0) continue;
        for_each_write(i, [&](const Extent& extent) { claims.push_back({extent, i, true}); });
        claims.push_back({grad_extent(tensor), i, false});
    }
    return claims;
}

bool TorchListing::writes_are_disjoint() {
    writes_.clear();
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
        if (tensors_[i].size == 0) continue;
        for_each_write(i, [&](const Extent& extent) { writes_.push_back(extent); });
    }
    sort_by_address(writes_);
    return find_overlap(writes_) == writes_.end();
}

bool TorchListing::apart_from_writes(const TensorRef& tensor) const {
    return tensor.size == 0 || find_overlap(writes_, grad_extent(tensor)) == writes_.end();
}

bool TorchListing::grads_are_disjoint() {
    grads_.clear();
    for (const TensorRef& tensor : tensors_) {
        if (tensor.size > 0) grads_.push_back(grad_extent(tensor));
    }
    sort_by_address(grads_);
    return find_overlap(grads_) == grads_.end();
}

}  // namespace sgdcore::bindings
