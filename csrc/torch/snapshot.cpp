// Whether modules and tensors of Python are still what they were. A decoder layer asks for some
// hundred of them before each token, for which Python itself would take longer than the layer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "decoder.h"

namespace py = pybind11;

namespace mixedquant {
namespace {

py::object checked(PyObject *made) {
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
}

struct Names {
    py::str forward{"forward"}, data_ptr{"data_ptr"}, version{"_version"};
    py::str hooks{"_forward_hooks"}, pre_hooks{"_forward_pre_hooks"}, training{"training"};
};

const Names &names() {
    static const Names *made = new Names;  // never freed: Python may be gone by then
    return *made;
}

uintptr_t address_of(const py::object &tensor) {
    return checked(PyObject_CallMethodNoArgs(tensor.ptr(), names().data_ptr.ptr()))
        .cast<uintptr_t>();
}

int64_t version_of(const py::object &tensor) {
    return checked(PyObject_GetAttr(tensor.ptr(), names().version.ptr())).cast<int64_t>();
}

// dict[name], or nullptr. Borrowed.
PyObject *found(const py::dict &dict, const py::object &name) {
    PyObject *object = PyDict_GetItemWithError(dict.ptr(), name.ptr());
    if (!object && PyErr_Occurred()) throw py::error_already_set();
    return object;
}

bool is_true(const py::dict &attributes, const py::str &name) {
    PyObject *value = found(attributes, name);
    const int answer = value ? PyObject_IsTrue(value) : 0;
    if (answer < 0) throw py::error_already_set();
    return answer > 0;
}

class Snapshot {
   public:
    using Places = std::vector<std::pair<py::dict, py::object>>;

    Snapshot(const Places &places, std::vector<py::dict> attributes, const py::list &classes,
             const py::list &tensors, const py::list &versioned)
        : attributes_(std::move(attributes)) {
        for (const auto &[dict, name] : places)
            objects_.push_back({dict, name, py::reinterpret_borrow<py::object>(dict[name])});
        for (const auto &cls : classes)
            forwards_.emplace_back(py::reinterpret_borrow<py::object>(cls),
                                   cls.attr(names().forward));
        for (const auto &tensor : tensors) {
            const auto object = py::reinterpret_borrow<py::object>(tensor);
            addresses_.emplace_back(object, address_of(object));
        }
        for (const auto &tensor : versioned) {
            const auto object = py::reinterpret_borrow<py::object>(tensor);
            versions_.emplace_back(object, version_of(object));
        }
    }

    bool is_current() const {
        for (const auto &[dict, name, object] : objects_)
            if (found(dict, name) != object.ptr()) return false;
        for (const auto &[cls, forward] : forwards_)
            if (!checked(PyObject_GetAttr(cls.ptr(), names().forward.ptr())).is(forward))
                return false;
        for (const auto &[tensor, address] : addresses_)
            if (address_of(tensor) != address) return false;
        for (const auto &[tensor, version] : versions_)
            if (version_of(tensor) != version) return false;
        return true;
    }

    bool is_plain() const {
        for (const py::dict &own : attributes_)
            if (found(own, names().forward) || is_true(own, names().hooks) ||
                is_true(own, names().pre_hooks) || is_true(own, names().training))
                return false;
        return true;
    }

   private:
    struct Entry {
        py::dict dict;
        py::object name, object;
    };
    std::vector<Entry> objects_;
    std::vector<py::dict> attributes_;
    std::vector<std::pair<py::object, py::object>> forwards_;
    std::vector<std::pair<py::object, uintptr_t>> addresses_;
    std::vector<std::pair<py::object, int64_t>> versions_;
};

bool all_hold(const std::vector<const Snapshot *> &snapshots) {
    for (const Snapshot *snapshot : snapshots)
        if (!snapshot->is_current() || !snapshot->is_plain()) return false;
    return true;
}

}  // namespace

void bind_snapshot(py::module_ &m) {
    py::class_<Snapshot>(m, "Snapshot")
        .def(py::init<const Snapshot::Places &, std::vector<py::dict>, const py::list &,
                      const py::list &, const py::list &>())
        .def("is_current", &Snapshot::is_current)
        .def("is_plain", &Snapshot::is_plain);
    m.def("all_hold", &all_hold);
}

}  // namespace mixedquant
