// Fills the device's tables, uploads them when they have changed, and launches the kernel.
//
// A step whose tables are on the device already only launches. Otherwise the tables are written to pinned memory and
// copied on the caller's stream to memory that no pending launch reads: the event behind the last launch tells. Where
// no such memory is free it is allocated, so that the host never waits.
#include "stepper.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <ranges>
#include <string>

#include "../engine/catalog.hpp"
#include "../extents.hpp"
#include "../step.hpp"

namespace sgdcore::cuda {
namespace {

constexpr std::size_t alignment = 16;  // of each table behind the other

std::size_t aligned(std::size_t size) { return (size + alignment - 1) / alignment * alignment; }

/// A combination of storage types with a loop over vectors; all states have one type.
struct Triple {
    DType param, grad, state;
    Path path;
};
constexpr Triple in_vectors[] = {
    {DType::float64, DType::float64, DType::float64, Path::float64},
    {DType::float32, DType::float32, DType::float32, Path::float32},
    {DType::float16, DType::float16, DType::float16, Path::float16},
    {DType::bfloat16, DType::bfloat16, DType::bfloat16, Path::bfloat16},
    {DType::float16, DType::float16, DType::float32, Path::float16_float16_float32},
    {DType::bfloat16, DType::bfloat16, DType::float32, Path::bfloat16_bfloat16_float32},
    {DType::float32, DType::float16, DType::float32, Path::float32_float16_float32},
    {DType::float32, DType::bfloat16, DType::float32, Path::float32_bfloat16_float32},
};

void require_aligned(const std::byte* pointer, DType dtype, const char* what) {
    if (address_of(pointer) % item_size(dtype) == 0) return;
    char address[20];
    std::snprintf(address, sizeof address, "0x%llx", static_cast<unsigned long long>(address_of(pointer)));
    throw std::invalid_argument(std::string("step: the address of a ") + what + ", " + address +
                                ", is not a multiple of the size of " + dtype_name(dtype));
}

void require_for_device(const TensorRef& tensor, const Hyper& hyper, bool zero_grad) {
    if (tensor.size == 0) return;
    if ((tensor.size - 1) / chunk_size >= std::numeric_limits<std::uint32_t>::max()) {
        throw std::invalid_argument("step: a tensor of " + std::to_string(tensor.size) + " elements is too large");
    }
    require_aligned(tensor.param, tensor.param_dtype, "parameter");
    if (tensor.has_average()) {
        require_aligned(tensor.states[average_slot], tensor.state_dtypes[average_slot], "average");
    }
    if (tensor.grad == nullptr) return;
    require_aligned(tensor.grad, tensor.grad_dtype, "gradient");
    for (int state = 0; hyper.states >> state != 0; ++state) {
        if (hyper.has_state(state)) require_aligned(tensor.states[state], tensor.state_dtypes[state], "state");
    }
    const auto item = static_cast<std::int64_t>(item_size(tensor.grad_dtype));
    for (const Axis& axis : tensor.grad_axes) {
        if (axis.stride % item != 0) {
            throw std::invalid_argument("step: a gradient's stride of " + std::to_string(axis.stride) +
                                        " bytes is not a multiple of the size of " + dtype_name(tensor.grad_dtype));
        }
    }
    if (zero_grad && may_overlap(tensor.grad_axes, item_size(tensor.grad_dtype))) {
        throw std::invalid_argument("step: zero_grad with a gradient whose strides reach an element twice");
    }
}

bool on_vector(const std::byte* base, std::size_t head, DType dtype) {
    return (address_of(base) + head * item_size(dtype)) % vector_bytes == 0;
}

/// True if all states that take part have elements of this type.
bool states_are(const DeviceTensor& tensor, DType dtype) {
    for (int state = 0; state < max_states; ++state) {
        if (tensor.states[state] != nullptr && tensor.state_dtypes[state] != dtype) return false;
    }
    return true;
}

bool states_on_vector(const DeviceTensor& tensor, std::size_t head) {
    for (int state = 0; state < max_states; ++state) {
        if (tensor.states[state] != nullptr && !on_vector(tensor.states[state], head, tensor.state_dtypes[state])) {
            return false;
        }
    }
    return true;
}

/// Chooses the loop that updates the tensor.
void choose_path(DeviceTensor& tensor) {
    tensor.path = Path::elements;
    tensor.head = 0;
    tensor.grad_in_vectors = false;
    if (tensor.axis_count != 0 || tensor.grad == nullptr) return;
    for (const Triple& triple : in_vectors) {
        if (triple.param != tensor.param_dtype || triple.grad != tensor.grad_dtype) continue;
        if (!states_are(tensor, triple.state)) continue;
        const std::size_t lanes = vector_bytes / std::min(item_size(triple.param), item_size(triple.grad));
        // The head aligns all arrays, or, if no head does, all but the gradient.
        for (std::size_t head = 0; head < lanes; ++head) {
            if (!on_vector(tensor.param, head, triple.param) || !states_on_vector(tensor, head)) continue;
            const bool grad = on_vector(tensor.grad, head, triple.grad);
            if (tensor.path != Path::elements && !grad) continue;
            tensor.path = triple.path;
            tensor.head = static_cast<std::uint8_t>(head);
            tensor.grad_in_vectors = grad;
            if (grad) return;
        }
        return;
    }
}

}  // namespace

void check_for_device(std::span<const TensorRef> tensors, std::span<const Hyper> hypers, bool zero_grad) {
    check(tensors, hypers);
    for (const TensorRef& tensor : tensors) {
        require_for_device(tensor, hypers[tensor.hyper], zero_grad);
    }
}

Stepper::Stepper(Runtime& runtime, int device)
    : runtime_(runtime), device_(device), blocks_(runtime.blocks_at_once(device)) {}

Stepper::~Stepper() {
    for (const std::unique_ptr<Table>& table : tables_) {
        // The driver waits for launches that still read the memory.
        if (table->memory != nullptr) runtime_.free(device_, table->memory);
        if (table->pinned != nullptr) runtime_.free_pinned(device_, table->pinned);
        if (table->event != nullptr) runtime_.destroy_event(device_, table->event);
    }
    for (std::byte* const memory : partials_) runtime_.free(device_, memory);
    if (partials_event_ != nullptr) runtime_.destroy_event(device_, partials_event_);
}

void Stepper::list(int rule, std::span<const TensorRef> tensors, std::span<const Hyper> hypers,
                   std::span<const DeviceScalars> scalars) {
    std::size_t count = 0, axis_count = 0;
    for (const TensorRef& tensor : tensors) {
        if (tensor.size == 0) continue;
        ++count;
        axis_count += tensor.grad_axes.size();
    }
    tensors_at_ = aligned(hypers.size() * sizeof(DeviceHyper));
    axes_at_ = tensors_at_ + count * sizeof(DeviceTensor);
    front_.resize(axes_at_ + axis_count * sizeof(Axis));
    list_hypers(rule, hypers, scalars);
    list_tensors(tensors, hypers);
    cut_chunks(tensors);
}

void Stepper::list_hypers(int rule, std::span<const Hyper> hypers, std::span<const DeviceScalars> scalars) {
    const std::span<const HyperSpec> specs = rules()[static_cast<std::size_t>(rule)].hypers;
    for (std::size_t i = 0; i < hypers.size(); ++i) {
        DeviceHyper entry{};
        entry.values = hypers[i].values;
        int number = 0;  // among the hyperparameters that may be on a device
        for (int hyper = 0; hyper < std::ssize(specs) && !scalars.empty(); ++hyper) {
            if (!specs[static_cast<std::size_t>(hyper)].on_device) continue;
            const DeviceScalar& scalar = scalars[i].of[number];
            if (scalar.device == device_) {
                entry.scalars.of[number] = scalar;
                entry.values[hyper] = 0;  // the host's value says nothing, and the table is compared
            }
            ++number;
        }
        std::memcpy(front_.data() + i * sizeof entry, &entry, sizeof entry);
    }
}

void Stepper::list_tensors(std::span<const TensorRef> tensors, std::span<const Hyper> hypers) {
    std::byte* to = front_.data() + tensors_at_;
    std::size_t axis = 0;
    for (const TensorRef& tensor : tensors) {
        if (tensor.size == 0) continue;
        const Hyper& hyper = hypers[tensor.hyper];
        DeviceTensor entry{};
        entry.param = tensor.param;
        entry.grad = tensor.grad;
        for (int state = 0; hyper.states >> state != 0 && tensor.grad != nullptr; ++state) {
            if (!hyper.has_state(state)) continue;
            entry.states[state] = tensor.states[state];
            entry.state_dtypes[state] = tensor.state_dtypes[state];
        }
        entry.pending = hyper.states != 0 && tensor.grad != nullptr ? tensor.pending : nullptr;
        entry.size = tensor.size;
        entry.hyper = tensor.hyper;
        entry.axes = static_cast<std::uint32_t>(axis);
        entry.axis_count = static_cast<std::uint8_t>(tensor.grad_axes.size());
        entry.first_step = tensor.first_step;
        entry.param_dtype = tensor.param_dtype;
        entry.grad_dtype = tensor.grad_dtype;
        choose_path(entry);
        if (tensor.has_average()) {
            entry.average = tensor.states[average_slot];
            entry.average_dtype = tensor.state_dtypes[average_slot];
            entry.average_is_new = (tensor.new_extras & 1u) != 0;
            entry.average_in_vectors =
                entry.average_dtype == entry.param_dtype && on_vector(entry.average, entry.head, entry.average_dtype);
        }
        std::memcpy(to, &entry, sizeof entry);
        to += sizeof entry;
        std::copy(tensor.grad_axes.begin(), tensor.grad_axes.end(),
                  reinterpret_cast<Axis*>(front_.data() + axes_at_) + axis);
        axis += tensor.grad_axes.size();
    }
}

void Stepper::cut_chunks(std::span<const TensorRef> tensors) {
    auto filled = tensors | std::views::filter([](const TensorRef& tensor) { return tensor.size > 0; });
    if (std::ranges::equal(filled, sizes_, {}, &TensorRef::size)) return;
    sizes_.clear();
    chunks_.clear();
    for (const TensorRef& tensor : filled) {
        const auto number = static_cast<std::uint32_t>(sizes_.size());
        const std::int64_t pieces = (tensor.size - 1) / chunk_size + 1;
        for (std::int64_t i = 0; i < pieces; ++i) chunks_.push_back({number, static_cast<std::uint32_t>(i)});
        sizes_.push_back(tensor.size);
    }
    ++chunks_version_;
}

Stepper::Table& Stepper::free_table(std::size_t size, bool any) {
    for (const std::unique_ptr<Table>& table : tables_) {
        if (any && !table->kept && table->capacity >= size && runtime_.finished(device_, table->event)) return *table;
    }
    // With room to grow, so that a few more tensors need no new memory.
    std::size_t capacity = 4096;
    while (capacity < size) capacity *= 2;
    auto table = std::make_unique<Table>();
    table->kept = true;  // until the table is complete
    tables_.push_back(std::move(table));
    Table& made = *tables_.back();
    made.pinned = runtime_.allocate_pinned(device_, capacity);
    made.memory = runtime_.allocate(device_, capacity);
    made.event = runtime_.create_event(device_);
    made.capacity = capacity;
    made.kept = false;
    return made;
}

void Stepper::upload(Table& table, Stream stream) {
    const std::size_t chunks_at = aligned(front_.size());
    std::size_t size = front_.size();
    std::memcpy(table.pinned, front_.data(), size);
    if (table.chunks_version != chunks_version_ || table.chunks_at != chunks_at) {
        size = chunks_at + chunks_.size() * sizeof(Chunk);
        std::memcpy(table.pinned + chunks_at, chunks_.data(), chunks_.size() * sizeof(Chunk));
        table.chunks_at = chunks_at;
        table.chunks_version = chunks_version_;
    }
    runtime_.copy(device_, table.memory, table.pinned, size, stream);
}

void Stepper::step(std::span<const TensorRef> tensors, std::span<const Hyper> hypers,
                   std::span<const DeviceScalars> scalars, const StepOptions& options,
                   const LaunchOptions& launch_options) {
    start(tensors, hypers, scalars, options, launch_options, nullptr);
}

void Stepper::find_norm(std::span<const TensorRef> tensors, std::span<const Hyper> hypers,
                        std::span<const DeviceScalars> scalars, const StepOptions& options,
                        const LaunchOptions& launch_options, const NormOptions& norm_options) {
    start(tensors, hypers, scalars, options, launch_options, &norm_options);
}

NormPartial* Stepper::partials(Stream stream, bool capturing) {
    const auto size = static_cast<std::size_t>(blocks_) * sizeof(NormPartial);
    if (partials_.empty()) {
        if (partials_event_ == nullptr) partials_event_ = runtime_.create_event(device_);
        partials_.push_back(runtime_.allocate(device_, size));
        partials_stream_ = stream;
    }
    if (capturing) {
        partials_.push_back(runtime_.allocate(device_, size));
        return reinterpret_cast<NormPartial*>(partials_.back());
    }
    if (partials_stream_ != stream) runtime_.wait(device_, stream, partials_event_);
    partials_stream_ = stream;
    return reinterpret_cast<NormPartial*>(partials_.front());
}

void Stepper::start(std::span<const TensorRef> tensors, std::span<const Hyper> hypers,
                    std::span<const DeviceScalars> scalars, const StepOptions& options,
                    const LaunchOptions& launch_options, const NormOptions* norm_options) {
    check_for_device(tensors, hypers, options.zero_grad);
    const std::lock_guard lock(mutex_);
    list(options.rule, tensors, hypers, scalars);
    if (chunks_.empty() && norm_options == nullptr) return;

    const Stream stream = launch_options.stream;
    const bool capturing = runtime_.capturing(device_, stream);
    if (capturing && options.average_weight_changes) {
        throw std::invalid_argument(
            "step: a captured graph would give every step the weight of this one in the averages; EMA's does not "
            "change");
    }
    const bool as_they_are = !capturing && current_ != nullptr && current_->chunks_version == chunks_version_ &&
                             current_->chunks_at == aligned(front_.size()) &&
                             std::memcmp(current_->pinned, front_.data(), front_.size()) == 0;
    const std::size_t size = aligned(front_.size()) + chunks_.size() * sizeof(Chunk);
    Table& table = as_they_are ? *current_ : free_table(size, !capturing);
    if (!as_they_are) {
        current_ = nullptr;
        table.kept = true;  // stays so if one of the calls below fails
        upload(table, stream);
    } else if (table.stream != stream) {
        runtime_.wait(device_, stream, table.event);  // the upload was on another stream
    }

    Launch launch{};
    launch.rule = options.rule;
    launch.hypers = reinterpret_cast<const DeviceHyper*>(table.memory);
    launch.tensors = reinterpret_cast<const DeviceTensor*>(table.memory + tensors_at_);
    launch.axes = reinterpret_cast<const Axis*>(table.memory + axes_at_);
    launch.chunks = reinterpret_cast<const Chunk*>(table.memory + table.chunks_at);
    launch.chunk_count = static_cast<std::int64_t>(chunks_.size());
    launch.found_inf = launch_options.found_inf;
    launch.grad_scale = launch_options.grad_scale;
    launch.grad_factor = options.grad_factor;
    launch.clip_value = options.clip_value;
    launch.clips = options.clip_value != std::numeric_limits<double>::infinity();
    launch.average_weight = options.average_weight;
    launch.zero_grad = options.zero_grad;
    launch.norm = launch_options.norm;
    const std::int64_t blocks = std::min(blocks_, launch.chunk_count);
    if (norm_options == nullptr) {
        runtime_.launch(device_, blocks, launch, stream);
    } else {
        NormLaunch norm_launch{};
        norm_launch.step = launch;
        norm_launch.partials = partials(stream, capturing);
        norm_launch.partial_count = std::max<std::int64_t>(blocks, 1);
        norm_launch.result = launch_options.norm;
        norm_launch.max_norm = norm_options->max_norm;
        norm_launch.limits_norm = norm_options->limits_norm;
        norm_launch.skip_nonfinite = norm_options->skip_nonfinite;
        runtime_.find_norm(device_, norm_launch, stream);
        if (!capturing) runtime_.record(device_, partials_event_, stream);
    }
    if (capturing) return;
    runtime_.record(device_, table.event, stream);
    table.stream = stream;
    table.kept = false;
    current_ = &table;
}

}  // namespace sgdcore::cuda
