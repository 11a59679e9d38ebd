// The GIL: releasing and taking it, calling Python, and when a step on the CPU lets other threads run.
//
// A thread that asks for the GIL after Python has ended must not go on. Since CPython 3.14 such a thread hangs. Earlier
// versions end the thread by pthread_exit, which with glibc unwinds its stack: destructors would then release
// references without the GIL, and one that may not throw would end the process by std::terminate. So the thread stops
// for good at the first frame of this module, with every version.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cstdint>
#include <span>
#include <utility>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

#include "../platform.hpp"
#include "../step.hpp"

namespace sgdcore::bindings {

/// function(), a call into Python that may wait for the GIL. Does not return if Python ends meanwhile. The function
/// should hold no references: unwinding would release them before the thread stops.
template <class Function>
auto unless_python_ends(Function&& function) {
#if defined(__GLIBCXX__)
    try {
        return std::forward<Function>(function)();
    } catch (
        const abi::__forced_unwind&) {  // leaving this block would end the process: the exception may not be swallowed
        for (;;) pause();
    }
#else
    return std::forward<Function>(function)();  // pthread_exit does not unwind here, or cannot be caught
#endif
}

/// Releases the GIL for a scope. pybind11's class has a destructor that may end the process.
class GilRelease {
  public:
    GilRelease() : state_(PyEval_SaveThread()) {}
    ~GilRelease() {
        unless_python_ends([this] { PyEval_RestoreThread(state_); });
    }
    GilRelease(const GilRelease&) = delete;
    GilRelease& operator=(const GilRelease&) = delete;

  private:
    PyThreadState* state_;
};

/// Takes the GIL for a scope, in any thread, also in one that has the GIL already.
class GilAcquire {
  public:
    GilAcquire() : state_(unless_python_ends([] { return PyGILState_Ensure(); })) {}
    ~GilAcquire() { PyGILState_Release(state_); }
    GilAcquire(const GilAcquire&) = delete;
    GilAcquire& operator=(const GilAcquire&) = delete;

  private:
    PyGILState_STATE state_;
};

/// callable(*args, **kwargs), where the call may run Python code or release the GIL. pybind11's call operator would
/// hold references of its own meanwhile.
inline pybind11::object call(const pybind11::handle& callable, const pybind11::tuple& args = pybind11::tuple(),
                             const pybind11::dict& kwargs = pybind11::dict()) {
    PyObject* const result =
        unless_python_ends([&] { return PyObject_Call(callable.ptr(), args.ptr(), kwargs.ptr()); });
    if (result == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(result);
}

/// object.name, where the look-up may run Python code; takes the place of pybind11's attr, as `call` does.
inline pybind11::object attribute(pybind11::handle object, const char* name) {
    PyObject* const found = unless_python_ends([&] { return PyObject_GetAttrString(object.ptr(), name); });
    if (found == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(found);
}

/// True if object.name exists. An exception counts as false.
inline bool has_attribute(pybind11::handle object, const char* name) {
    return unless_python_ends([&] { return PyObject_HasAttrString(object.ptr(), name); }) != 0;
}

/// object.name, or `otherwise` if the look-up raises an exception.
inline pybind11::object attribute_or(pybind11::handle object, const char* name, const pybind11::object& otherwise) {
    PyObject* const found = unless_python_ends([&] { return PyObject_GetAttrString(object.ptr(), name); });
    if (found == nullptr) PyErr_Clear();
    return found == nullptr ? otherwise : pybind11::reinterpret_steal<pybind11::object>(found);
}

/// An attribute of a module, which the call imports if needed.
inline pybind11::object attribute_of(const char* module, const char* name) {
    PyObject* const found = unless_python_ends([&] { return PyImport_ImportModule(module); });
    if (found == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(found).attr(name);
}

/// Releasing and taking the GIL costs about as much as updating so many elements, and other threads may keep it.
constexpr bool releases_gil(std::int64_t elements) { return elements >= 16 * 1024; }

/// One step over tensors on the CPU, which have so many elements together. Always inlined: steps over few elements
/// notice a call.
SGDCORE_INLINE void step_on_cpu(std::span<const TensorRef> tensors, std::int64_t elements,
                                std::span<const Hyper> hypers, const StepOptions& options) {
    if (!releases_gil(elements)) return step(tensors, hypers, options);
    const GilRelease release;
    step(tensors, hypers, options);
}

}  // namespace sgdcore::bindings
