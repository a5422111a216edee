// Makes the library of emulated kernels (tests/test_cuda.py) treat CPU tensors as tensors of
// cuda:0. It defines the functions that csrc/torch/cuda.cpp calls for a tensor's device and the
// current stream.
#define USE_CUDA
#include <torch/csrc/stable/c/shim.h>

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t *type) {
    *type = aoti_torch_device_type_cuda();
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t *index) {
    *index = 0;
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle *guard) {
    *guard = nullptr;
    return device == 0 ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void **stream) {
    *stream = nullptr;
    return device == 0 ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}
