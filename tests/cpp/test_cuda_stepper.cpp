// What goes to the device in a step: tables, their upload and reuse, streams, graphs, failures. On simulated devices.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <vector>

#include "check.hpp"
#include "cuda/stepper.hpp"
#include "data.hpp"
#include "reference.hpp"
#include "simulated.hpp"

namespace sgdcore::test {
namespace {

using cuda::LaunchOptions;
using cuda::SimulatedRuntime;
using cuda::Stepper;

constexpr DTypes float32{DType::float32, DType::float32, DType::float32};

cuda::Stream stream_of(std::uintptr_t number) { return reinterpret_cast<cuda::Stream>(number); }

const std::vector<SgdHyper> hypers{
    {.lr = 0.1},
    {.lr = 0.01, .momentum = 0.9, .weight_decay = 1e-4, .nesterov = true},
    {.lr = 0.3, .momentum = 0.5, .dampening = 0.5, .maximize = true},
    {.lr = 1e-3, .weight_decay = 0.1},
};

std::vector<TensorRef> refs_of(std::vector<TestTensor>& tensors) {
    std::vector<TensorRef> refs;
    for (TestTensor& tensor : tensors) refs.push_back(tensor.ref());
    return refs;
}

std::vector<TestTensor> some_tensors(std::uint64_t seed = 11) {
    Random random(seed);
    std::vector<TestTensor> tensors;
    const std::int64_t sizes[] = {1, 0, 3, 64, 1000, 17, 8193, 5, 33, 20'000};
    for (std::size_t i = 0; i < std::size(sizes); ++i) {
        tensors.emplace_back(float32, sizes[i], static_cast<std::uint32_t>(i % hypers.size()), false, random,
                             i % 3 * 4);
    }
    return tensors;
}

void expect_step(std::vector<TestTensor>& tensors, std::span<const SgdHyper> taken = hypers,
                 const StepOptions& options = {}) {
    for (TestTensor& tensor : tensors) tensor.expect_step(taken, options);
}

void check(const std::vector<TestTensor>& tensors, const std::string& context) {
    for (const TestTensor& tensor : tensors) tensor.check(context);
}

/// A stream of work long enough that what is not waited for has not happened yet.
constexpr std::size_t behind = 1000;

}  // namespace

TEST(cuda_stepper, all_groups_types_and_sizes_in_one_launch) {
    SimulatedRuntime runtime;
    runtime.shuffled = true;
    Stepper stepper(runtime, 0);
    Random random(6);
    const std::vector<DTypes> triples = all_triples();
    const std::int64_t sizes[] = {1, 0, 3, 64, 1000, 17, 4096, 5, 33, 129};
    std::vector<TestTensor> tensors;
    for (std::size_t i = 0; i < 4 * triples.size(); ++i) {
        const std::int64_t size = i % 50 == 0 ? 40'000 : sizes[i % std::size(sizes)];
        // Offsets of whole elements: the arrays of one tensor are aligned differently in the wider types.
        tensors.emplace_back(triples[i * 7 % triples.size()], size, static_cast<std::uint32_t>(i % hypers.size()),
                             i % 3 == 0, random, i % 5 * 8);
    }
    constexpr double factors[] = {1, 1, 0.3, 0x1p-16, 1, 0.3};
    constexpr double infinity = std::numeric_limits<double>::infinity();
    constexpr double limits[] = {infinity, infinity, infinity, infinity, 0.7, 0.1};
    for (std::size_t i = 0; i < std::size(factors); ++i) {
        const StepOptions options{.zero_grad = i == 5, .grad_factor = factors[i], .clip_value = limits[i]};
        stepper.step(refs_of(tensors), hypers_of(hypers), {}, options, {});
        expect_step(tensors, hypers, options);
        for (TestTensor& tensor : tensors) tensor.initialized();
        CHECK(runtime.counts.launches == static_cast<std::int64_t>(i + 1));
    }
    check(tensors, "six steps");
}

TEST(cuda_stepper, many_groups_of_one_tensor_take_one_launch) {
    SimulatedRuntime runtime;
    Stepper stepper(runtime, 0);
    Random random(7);
    std::vector<SgdHyper> groups;
    std::vector<TestTensor> tensors;
    for (std::uint32_t i = 0; i < 465; ++i) {
        groups.push_back({.lr = 0.1 / (i + 1), .momentum = 0.9});
        tensors.emplace_back(float32, 40 + i, i, false, random);
    }
    stepper.step(refs_of(tensors), hypers_of(groups), {}, {}, {});
    expect_step(tensors, groups);
    check(tensors, "465 groups");
    CHECK(runtime.counts.launches == 1 && runtime.counts.copies == 1);
}

TEST(cuda_stepper, tables_are_uploaded_when_they_changed) {
    SimulatedRuntime runtime;
    Stepper stepper(runtime, 0);
    std::vector<TestTensor> tensors = some_tensors();
    std::vector<SgdHyper> groups = hypers;
    const auto step = [&](const char* what, std::int64_t copies) {
        const std::int64_t before = runtime.counts.copies;
        stepper.step(refs_of(tensors), hypers_of(groups), {}, {}, {});
        expect_step(tensors, groups);
        check(tensors, what);
        CHECK(runtime.counts.copies - before == copies, what);
    };
    step("the first step", 1);
    const std::int64_t all = runtime.counts.copied_bytes;
    step("nothing changed", 0);
    step("nothing changed again", 0);
    groups[1].lr = 0.02;
    step("another learning rate", 1);
    CHECK(runtime.counts.copied_bytes - all < all, "the chunks were copied again");
    groups[2].momentum = 0;
    step("no momentum any more", 1);
    step("still none", 0);
    tensors.pop_back();
    step("fewer tensors", 1);
    Random random(12);
    tensors.emplace_back(float32, 100'000, 1, true, random);
    step("another tensor, at its first step", 1);
    tensors.back().initialized();
    step("at its second step", 1);
    step("nothing changed at last", 0);
    tensors.back() = TestTensor(float32, 30'000, 1, false, random);
    step("another size", 1);
    const std::int64_t allocations = runtime.counts.allocations;
    for (int i = 0; i < 20; ++i) {
        groups[0].lr *= 0.9;
        step("a schedule", 1);
    }
    CHECK(runtime.counts.allocations == allocations, "a step that changes nothing but a number allocates");
}

TEST(cuda_stepper, host_ahead_of_the_device) {
    // Each step has other numbers and other addresses, and the device has done none of them when the last is listed.
    SimulatedRuntime runtime(1, behind);
    Stepper stepper(runtime, 0);
    std::vector<std::vector<TestTensor>> sets;
    std::vector<SgdHyper> groups = hypers;
    for (std::uint64_t i = 0; i < 12; ++i) {
        sets.push_back(some_tensors(i));
        groups[1].lr = 0.01 * static_cast<double>(i + 1);
        stepper.step(refs_of(sets.back()), hypers_of(groups), {}, {}, {.stream = stream_of(i % 3)});
        expect_step(sets.back(), groups);
    }
    runtime.synchronize_all();
    for (const std::vector<TestTensor>& tensors : sets) check(tensors, "behind");
    const std::int64_t allocations = runtime.counts.allocations;
    for (int i = 0; i < 10; ++i) {
        groups[0].lr *= 0.9;
        stepper.step(refs_of(sets[0]), hypers_of(groups), {}, {}, {});
        expect_step(sets[0], groups);
        runtime.synchronize_all();
        check(sets[0], "later");
    }
    CHECK(runtime.counts.allocations == allocations, "tables that are free again are not used");
}

TEST(cuda_stepper, another_stream_waits_for_the_tables) {
    SimulatedRuntime runtime(1, behind);
    Stepper stepper(runtime, 0);
    std::vector<TestTensor> tensors = some_tensors();
    for (const std::uintptr_t stream : {1u, 2u, 2u, 1u, 3u}) {
        stepper.step(refs_of(tensors), hypers_of(hypers), {}, {}, {.stream = stream_of(stream)});
        expect_step(tensors);
        runtime.synchronize(0, stream_of(stream));  // the caller's care for the tensors; the tables' is ours
    }
    check(tensors, "three streams");
    CHECK(runtime.counts.copies == 1);
    // The stream that has the upload is not run by the caller.
    SimulatedRuntime other(1, behind);
    Stepper fresh(other, 0);
    std::vector<TestTensor> first = some_tensors(1), same = some_tensors(2);
    fresh.step(refs_of(same), hypers_of(hypers), {}, {}, {.stream = stream_of(1)});
    fresh.step(refs_of(same), hypers_of(hypers), {}, {}, {.stream = stream_of(2)});
    other.synchronize(0, stream_of(2));
    expect_step(same);
    expect_step(same);
    check(same, "a stream that was not run");
}

TEST(cuda_stepper, numbers_on_the_device) {
    SimulatedRuntime runtime;
    Stepper stepper(runtime, 0);
    std::vector<TestTensor> tensors = some_tensors();
    float lr = 0.1f;
    double weight_decay = 0;
    std::vector<SgdHyper> groups = hypers;
    std::vector<DeviceScalars> scalars(groups.size());
    scalars[1].of[0] = {reinterpret_cast<const std::byte*>(&lr), 0, DType::float32};
    scalars[1].of[1] = {reinterpret_cast<const std::byte*>(&weight_decay), 0, DType::float64};
    scalars[0].of[0] = {reinterpret_cast<const std::byte*>(&lr), 1, DType::float32};  // not this device's
    for (const double value : {0.0, 0.1, 0.01, 0.0}) {
        weight_decay = value;
        lr *= 0.7f;
        groups[1].lr = NAN;  // what the host has there counts for nothing
        stepper.step(refs_of(tensors), hypers_of(groups), scalars, {}, {});
        groups[1].lr = static_cast<double>(lr);
        groups[1].weight_decay = value;
        expect_step(tensors, groups);
    }
    check(tensors, "lr and weight_decay on the device");
    CHECK(runtime.counts.copies <= 2, "numbers on the device are no reason to upload");
}

TEST(cuda_stepper, scale_and_found_inf_stay_on_the_device) {
    SimulatedRuntime runtime(1, behind);
    Stepper stepper(runtime, 0);
    std::vector<TestTensor> tensors = some_tensors();
    float scale = 3, found_inf = 0;
    const auto step = [&] {
        stepper.step(refs_of(tensors), hypers_of(hypers), {}, {}, {.found_inf = &found_inf, .grad_scale = &scale});
    };
    step();
    scale = 65536;  // before the device comes to it
    runtime.synchronize_all();
    expect_step(tensors, hypers, {.grad_factor = 1.0f / 65536});
    scale = 3;
    step();
    runtime.synchronize_all();
    expect_step(tensors, hypers, {.grad_factor = static_cast<double>(static_cast<float>(1.0 / 3))});
    for (const float found : {1.0f, 2.0f, NAN}) {  // GradScaler sums what its devices found
        found_inf = found;
        step();
        runtime.synchronize_all();
    }
    check(tensors, "scaled");
}

TEST(cuda_stepper, a_first_step_that_did_not_happen_comes_later) {
    SimulatedRuntime runtime;
    Stepper stepper(runtime, 0);
    Random random(13);
    std::vector<TestTensor> tensors;
    tensors.emplace_back(float32, 3 * chunk_size + 5, 2, true, random);
    std::vector<std::uint8_t> pending(4, 1);
    float found_inf = 1;
    std::vector<TensorRef> refs = refs_of(tensors);
    refs[0].first_step = false;  // the host takes the momentum buffer for filled
    refs[0].pending = pending.data();
    const auto step = [&] { stepper.step(refs, hypers_of(hypers), {}, {}, {.found_inf = &found_inf}); };
    step();
    step();
    check(tensors, "skipped");
    CHECK(std::ranges::count(pending, 1) == 4);
    found_inf = 0;
    step();
    expect_step(tensors);
    check(tensors, "the first that happened");
    CHECK(std::ranges::count(pending, 0) == 4);
    tensors[0].initialized();
    step();
    expect_step(tensors);
    found_inf = 1;
    step();
    check(tensors, "later ones");
    CHECK(runtime.counts.copies == 1);
}

TEST(cuda_stepper, graphs_replay_with_new_numbers) {
    SimulatedRuntime runtime(1, behind);
    float lr = 0.1f, scale = 2, found_inf = 0;
    std::vector<TestTensor> tensors = some_tensors(), others = some_tensors(3);
    std::vector<DeviceScalars> scalars(hypers.size());
    for (DeviceScalars& each : scalars) each.of[0] = {reinterpret_cast<const std::byte*>(&lr), 0, DType::float32};
    Stepper stepper(runtime, 0);
    const LaunchOptions on_device{.stream = stream_of(1), .found_inf = &found_inf, .grad_scale = &scale};
    const auto expect = [&](std::vector<TestTensor>& stepped) {
        std::vector<SgdHyper> groups = hypers;
        for (SgdHyper& group : groups) group.lr = static_cast<double>(lr);
        expect_step(stepped, groups, {.grad_factor = 1.0 / static_cast<double>(scale)});
    };
    stepper.step(refs_of(tensors), hypers_of(hypers), scalars, {}, on_device);  // a warm-up
    runtime.synchronize_all();
    expect(tensors);
    runtime.begin_capture(on_device.stream);
    stepper.step(refs_of(tensors), hypers_of(hypers), scalars, {}, on_device);
    stepper.step(refs_of(others), hypers_of(hypers), scalars, {}, on_device);
    const SimulatedRuntime::Graph graph = runtime.end_capture(on_device.stream);
    check(tensors, "captured, not run");
    check(others, "captured, not run");
    for (int replay = 0; replay < 4; ++replay) {
        lr *= 0.5f;
        scale *= 4;
        // Ordinary steps in between use tables of their own, also when more are needed than there were.
        for (std::vector<TestTensor>* stepped : {&others, &tensors, &others}) {
            stepper.step(refs_of(*stepped), hypers_of(hypers), scalars, {}, on_device);
            expect(*stepped);
        }
        runtime.synchronize_all();
        for (const SimulatedRuntime::Operation& operation : graph) operation();
        expect(tensors);
        expect(others);
        found_inf = 1;
        for (const SimulatedRuntime::Operation& operation : graph) operation();
        found_inf = 0;
        check(tensors, "replayed");
        check(others, "replayed");
    }
}

TEST(cuda_stepper, failures_change_nothing_and_are_got_over) {
    for (const char* call :
         {"capturing", "finished", "allocate_pinned", "allocate", "create_event", "copy", "launch"}) {
        SimulatedRuntime runtime(1, behind);
        Stepper stepper(runtime, 0);
        std::vector<TestTensor> tensors = some_tensors();
        std::vector<SgdHyper> groups = hypers;
        const auto step = [&] {
            groups[0].lr *= 0.5;  // a reason to upload
            stepper.step(refs_of(tensors), hypers_of(groups), {}, {}, {});
        };
        step();
        expect_step(tensors, groups);
        runtime.failing = call;  // the device has not done that step, so its tables cannot be used for the next
        CHECK_THROWS(cuda::CudaError, call, step());
        runtime.failing.clear();
        runtime.synchronize_all();
        check(tensors, call);
        for (int i = 0; i < 2; ++i) {
            step();
            expect_step(tensors, groups);
        }
        runtime.synchronize_all();
        check(tensors, std::string("after ") + call);
    }
}

TEST(cuda_stepper, strided_gradients) {
    SimulatedRuntime runtime;
    Stepper stepper(runtime, 0);
    Random random(14);
    // A transposed one, a reversed one, a repeated one; more than a chunk.
    const std::int64_t rows = 150, columns = 70;
    const std::vector<std::vector<Axis>> layouts{
        {{rows, 4}, {columns, rows * 4}}, {{rows * columns, -4}}, {{rows, 0}, {columns, 4}}, {{rows, 4}, {columns, 8}}};
    for (std::size_t i = 0; i < layouts.size(); ++i) {
        for (const bool zero_grad : {false, true}) {
            std::vector<float> param(rows * columns), grad(2 * rows * columns + 1), momentum(rows * columns);
            const auto bytes = [](std::vector<float>& array) { return reinterpret_cast<std::byte*>(array.data()); };
            fill(DType::float32, bytes(param), rows * columns, random);
            fill(DType::float32, bytes(grad), std::ssize(grad), random);
            fill(DType::float32, bytes(momentum), rows * columns, random);
            std::vector<float> expected_param = param, expected_momentum = momentum, expected_grad = grad;
            const std::int64_t origin = i == 1 ? rows * columns - 1 : 0;
            for (std::int64_t e = 0; e < rows * columns; ++e) {
                std::int64_t offset = 0, rest = e;
                for (std::size_t axis = layouts[i].size(); axis-- > 0;) {
                    offset += rest % layouts[i][axis].length * layouts[i][axis].stride;
                    rest /= layouts[i][axis].length;
                }
                const std::int64_t at = origin + offset / 4;
                Word p = read_word(DType::float32, bytes(expected_param), e);
                Word b = read_word(DType::float32, bytes(expected_momentum), e);
                update_word(float32, hypers[1], false, p, read_word(DType::float32, bytes(grad), at), b);
                write_word(DType::float32, bytes(expected_param), e, p);
                write_word(DType::float32, bytes(expected_momentum), e, b);
                if (zero_grad) expected_grad[static_cast<std::size_t>(at)] = 0;
            }
            TensorRef tensor{.param = bytes(param),
                             .grad = bytes(grad) + origin * 4,
                             .states = {bytes(momentum)},
                             .size = rows * columns,
                             .grad_axes = layouts[i],
                             .hyper = 1};
            if (zero_grad && i >= 2) {
                CHECK_THROWS(std::invalid_argument, "reach an element twice",
                             stepper.step({&tensor, 1}, hypers_of(hypers), {}, {.zero_grad = true}, {}));
                continue;
            }
            stepper.step({&tensor, 1}, hypers_of(hypers), {}, {.zero_grad = zero_grad}, {});
            const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
                for (std::size_t e = 0; e < a.size(); ++e) {
                    const auto word = [&](const std::vector<float>& v) {
                        return read_word(DType::float32, reinterpret_cast<const std::byte*>(v.data()),
                                         static_cast<std::int64_t>(e));
                    };
                    if (!same_word(DType::float32, word(a), word(b))) return false;
                }
                return true;
            };
            const std::string text = "layout " + std::to_string(i);
            CHECK(same(param, expected_param), text);
            CHECK(same(momentum, expected_momentum), text);
            CHECK(same(grad, expected_grad), text);
        }
    }
}

TEST(cuda_stepper, refusals) {
    SimulatedRuntime runtime;
    Stepper stepper(runtime, 0);
    std::vector<TestTensor> tensors = some_tensors();
    struct Defect {
        const char* message;
        void (*apply)(TensorRef&);
    };
    const Defect defects[] = {
        {"hyperparameter index", [](TensorRef& t) { t.hyper = 4; }},
        {"null pointer", [](TensorRef& t) { t.grad = nullptr; }},
        {"address of a parameter", [](TensorRef& t) { t.param += 1; }},
        {"address of a gradient", [](TensorRef& t) { t.grad += 2; }},
        {"address of a state", [](TensorRef& t) { t.states[0] += 3; }},
        {"too large", [](TensorRef& t) { t.size = std::int64_t{1} << 62; }},
    };
    for (const Defect& defect : defects) {
        std::vector<TensorRef> refs = refs_of(tensors);
        defect.apply(refs[6]);
        CHECK_THROWS(std::invalid_argument, defect.message, stepper.step(refs, hypers_of(hypers), {}, {}, {}));
        check(tensors, defect.message);
    }
    TensorRef odd = tensors[6].ref();
    const Axis axes[] = {{odd.size, 6}};
    odd.grad_axes = axes;
    CHECK_THROWS(std::invalid_argument, "stride", stepper.step({&odd, 1}, hypers_of(hypers), {}, {}, {}));
    stepper.step({}, {}, {}, {}, {});
    CHECK(runtime.counts.launches == 0);
    stepper.step(refs_of(tensors), hypers_of(hypers), {}, {}, {});
    expect_step(tensors);
    check(tensors, "after refusals");
}

}  // namespace sgdcore::test
