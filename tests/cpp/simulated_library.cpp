// The simulated devices as a library for tests in Python, which load it with ctypes.
#include <cstdint>

#include "simulated.hpp"

using sgdcore::cuda::Runtime;
using sgdcore::cuda::SimulatedRuntime;

#pragma GCC visibility push(default)
extern "C" {

/// The name that sgdcore._core expects of a capsule with a runtime.
const char* simulated_capsule_name() { return Runtime::capsule_name; }

/// Devices that stay for the life of the process.
Runtime* simulated_devices(int count) { return new SimulatedRuntime(count); }

/// From now on this call fails on a device; -1: on all.
void simulated_failure(Runtime* runtime, const char* call, int device) {
    auto& simulated = static_cast<SimulatedRuntime&>(*runtime);
    simulated.failing = call;
    simulated.failing_device = device;
}

/// Begins to capture the default stream. Ending a capture drops what it has captured.
void simulated_capture(Runtime* runtime, bool begin) {
    auto& simulated = static_cast<SimulatedRuntime&>(*runtime);
    if (begin) {
        simulated.begin_capture(nullptr);
    } else {
        simulated.end_capture(nullptr);
    }
}

/// What the devices were told to do: launches, copies, allocations.
void simulated_counts(Runtime* runtime, std::int64_t* counts) {
    const auto& found = static_cast<SimulatedRuntime&>(*runtime).counts;
    counts[0] = found.launches;
    counts[1] = found.copies;
    counts[2] = found.allocations;
}
}
#pragma GCC visibility pop
