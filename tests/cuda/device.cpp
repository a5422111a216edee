// Makes the emulated kernels' library (tests/test_cuda.py) take the CPU's tensors for ones of cuda:0:
// csrc/torch/cuda.cpp, linked with this, asks here where a tensor is and for the current stream.
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
