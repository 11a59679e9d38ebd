// Steps on one device: keeps the device's tables from step to step, and uploads them when they changed.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "../process.hpp"
#include "../work.hpp"
#include "runtime.hpp"

namespace sgdcore::cuda {

/// What differs from device to device in one step.
struct LaunchOptions {
    Stream stream = nullptr;
    const float* found_inf = nullptr;   // on the device: not zero makes the step do nothing
    const float* grad_scale = nullptr;  // on the device: every gradient is multiplied by its reciprocal
    NormResult* norm = nullptr;         // on the device: what `find_norm` found, which the step uses; may be null
};

/// How the norm of a step's gradients is used.
struct NormOptions {
    bool limits_norm = false;  // by max_norm
    double max_norm = 0;
    bool skip_nonfinite = false;  // leaves a step out if an element is not finite
};

/// Throws std::invalid_argument if sgdcore::check does, or if an entry is not one for a device.
void check_for_device(std::span<const TensorRef> tensors, std::span<const Hyper> hypers, bool zero_grad);

class Stepper {
  public:
    Stepper(Runtime& runtime, int device);
    ~Stepper();
    Stepper(const Stepper&) = delete;
    Stepper& operator=(const Stepper&) = delete;

    int device() const { return device_; }
    /// False in a process that was forked later: the tables belong to the parent, and a thread that the fork left
    /// behind may have been changing them. Such a stepper may be neither used nor destroyed.
    bool is_of_this_process() const { return forks_ == forks(); }

    /// Puts one step over all tensors on the stream: at most one copy, and one launch. Does not wait.
    ///
    /// The step uses the memory in the order of the stream. `scalars` is empty or has an entry for each of `hypers`;
    /// those on other devices are left alone, and the host's values count. Throws
    /// std::invalid_argument or CudaError, with no tensor changed.
    void step(std::span<const TensorRef> tensors, std::span<const Hyper> hypers, std::span<const DeviceScalars> scalars,
              const StepOptions& options, const LaunchOptions& launch_options);

    /// Puts the search for the norm of all gradients on the stream, which writes `launch_options.norm`: at most one
    /// copy, and two launches. Otherwise as `step`. Where there are no elements the norm is 0.
    void find_norm(std::span<const TensorRef> tensors, std::span<const Hyper> hypers,
                   std::span<const DeviceScalars> scalars, const StepOptions& options,
                   const LaunchOptions& launch_options, const NormOptions& norm_options);

  private:
    /// Memory for one version of the tables: on the device, and pinned on the host. A graph uses both whenever it is
    /// replayed, so a graph's tables are never changed again.
    struct Table {
        std::byte *pinned = nullptr, *memory = nullptr;
        std::size_t capacity = 0;
        Event event = nullptr;  // recorded behind the last launch that reads it
        Stream stream = nullptr;
        std::size_t chunks_at = 0;
        std::uint64_t chunks_version = 0;
        bool kept = false;  // never changed again: a graph has it, or the device may still read it
    };

    void start(std::span<const TensorRef> tensors, std::span<const Hyper> hypers,
               std::span<const DeviceScalars> scalars, const StepOptions& options, const LaunchOptions& launch_options,
               const NormOptions* norm_options);
    /// Memory for the blocks' sums that no launch on another stream uses.
    NormPartial* partials(Stream stream, bool capturing);
    /// Fills the tables for a step.
    void list(int rule, std::span<const TensorRef> tensors, std::span<const Hyper> hypers,
              std::span<const DeviceScalars> scalars);
    void list_hypers(int rule, std::span<const Hyper> hypers, std::span<const DeviceScalars> scalars);
    void list_tensors(std::span<const TensorRef> tensors, std::span<const Hyper> hypers);
    /// Lists the chunks anew if the sizes have changed.
    void cut_chunks(std::span<const TensorRef> tensors);
    Table& free_table(std::size_t size, bool any);
    void upload(Table& table, Stream stream);

    Runtime& runtime_;
    const int device_;
    const std::int64_t blocks_;
    const std::uint32_t forks_ = forks();
    std::mutex mutex_;
    std::vector<std::unique_ptr<Table>> tables_;
    std::vector<std::byte*> partials_;  // the first for launches, the others for those of graphs
    Event partials_event_ = nullptr;    // recorded behind the last launch that uses the first
    Stream partials_stream_ = nullptr;
    Table* current_ = nullptr;
    // The tables of the step: hyperparameters, tensors and axes; and the chunks, which depend only on the sizes.
    std::vector<std::byte> front_;
    std::vector<Chunk> chunks_;
    std::size_t tensors_at_ = 0, axes_at_ = 0;
    std::vector<std::int64_t> sizes_;  // of the tensors that chunks_ lists
    std::uint64_t chunks_version_ = 0;
};

}  // namespace sgdcore::cuda
