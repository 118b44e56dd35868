// A stand-in for the CUDA runtime and driver on which torch's CUDA build runs without a GPU: memory
// is counted and never there, addresses only rise, kernels are launched and do nothing, streams are
// always done. stand_in.py builds it as libcudart.so.
//
// STAND_IN_DEVICES is the number of devices (1), STAND_IN_CAPACITY the memory of each in bytes (without
// it, more than any test takes), STAND_IN_CAPABILITY its compute capability ("90"),
// STAND_IN_MULTIPROCESSORS their number, and STAND_IN_SHARED_BYTES what a block can have of shared memory.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <string>

namespace {

constexpr size_t kPage = size_t(2) << 20;
constexpr int kMostDevices = 16;
size_t used[kMostDevices];
thread_local int current = 0;
size_t next_segment = size_t(1) << 32;
size_t next_range = size_t(1) << 50;
struct Segment {
  size_t size;
  int device;
};
std::map<size_t, Segment> segments;
std::map<cudaStream_t, unsigned long long> captures;

size_t number(const char* name, size_t otherwise) {
  const char* text = getenv(name);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}
size_t capacity() {
  static const size_t bytes = number("STAND_IN_CAPACITY", size_t(1) << 45);
  return bytes;
}

int succeed() { return 0; }

// Expandable segments: physical memory is created in pages; the handle is the page's size.
int create(unsigned long long* handle, size_t size, const void*, unsigned long long) {
  if (used[current] + size > capacity()) return CUDA_ERROR_OUT_OF_MEMORY;
  used[current] += *handle = size;
  return 0;
}
int release(unsigned long long handle) { return used[current] -= handle, 0; }
int reserve(unsigned long long* address, size_t size, size_t, unsigned long long, unsigned long long) {
  *address = next_range;
  next_range += size;
  return 0;
}
int attribute(int* value, int, int) { return *value = 0; }

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** address, size_t size) {
  if (used[current] + size > capacity()) return cudaErrorMemoryAllocation;
  used[current] += size;
  segments[next_segment] = {size, current};
  *address = reinterpret_cast<void*>(next_segment);
  next_segment += (size + kPage - 1) / kPage * kPage;
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  auto segment = segments.find(reinterpret_cast<size_t>(address));
  if (segment == segments.end()) return cudaErrorInvalidValue;
  used[segment->second.device] -= segment->second.size;
  segments.erase(segment);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = capacity() - used[current];
  *total_bytes = capacity();
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** address, size_t size) {
  return *address = calloc(1, size), cudaSuccess;
}
cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  return cudaMallocHost(address, size);
}
cudaError_t cudaFreeHost(void* address) { return free(address), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void*, size_t size, cudaMemcpyKind kind, cudaStream_t) {
  if (kind == cudaMemcpyDeviceToHost) memset(to, 0, size);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const size_t capability = number("STAND_IN_CAPABILITY", 90);
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "stand-in");
  properties->totalGlobalMem = capacity();
  properties->major = capability / 10;
  properties->minor = capability % 10;
  properties->multiProcessorCount = number("STAND_IN_MULTIPROCESSORS", 132);
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = number("STAND_IN_SHARED_BYTES", 227 << 10);
  properties->sharedMemPerMultiprocessor = properties->sharedMemPerBlockOptin + (1 << 10);
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 64 << 10;
  properties->l2CacheSize = 50 << 20;
  for (int axis = 0; axis < 3; ++axis) {
    properties->maxGridSize[axis] = axis ? 65535 : 2147483647;
    properties->maxThreadsDim[axis] = axis == 2 ? 64 : 1024;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = properties.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = properties.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = properties.maxBlocksPerMultiProcessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = properties.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = properties.sharedMemPerBlockOptin;
      break;
    case cudaDevAttrMaxGridDimX: *value = properties.maxGridSize[0]; break;
    case cudaDevAttrWarpSize: *value = properties.warpSize; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->binaryVersion = attributes->ptxVersion = number("STAND_IN_CAPABILITY", 90);
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeDevice;
  auto after = segments.upper_bound(reinterpret_cast<size_t>(address));
  attributes->device = after == segments.begin() ? current : std::prev(after)->second.device;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  return *count = number("STAND_IN_DEVICES", 1), cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current = device, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -1, cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = captures.count(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  static unsigned long long next = 0;
  return captures[stream] = ++next, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  captures.erase(stream);
  return *graph = reinterpret_cast<cudaGraph_t>(8), cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t**,
#if CUDART_VERSION >= 13000
    const cudaGraphEdgeData**,
#endif
    size_t* dependencies) {
  if (id && captures.count(stream)) *id = captures[stream];
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(8);
  if (dependencies) *dependencies = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
  return *count = 1, cudaSuccess;  // torch warns of empty graphs
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) {
  return *graph = reinterpret_cast<cudaGraphExec_t>(8), cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 1, cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  static size_t next = 0;
  return *stream = reinterpret_cast<cudaStream_t>(next += 64), cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(8), cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* result) {
  static const std::map<std::string, void*> known = {
      {"cuMemCreate", reinterpret_cast<void*>(create)},
      {"cuMemRelease", reinterpret_cast<void*>(release)},
      {"cuMemAddressReserve", reinterpret_cast<void*>(reserve)},
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(attribute)},
  };
  auto found = known.find(name);
  *function = found == known.end() ? reinterpret_cast<void*>(succeed) : found->second;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(
    const char* name, void** function, unsigned long long flags,
    cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}
#ifndef cudaGetDeviceProperties  // before CUDA 13 the macro gives it this name
cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp* properties, int device) {
  return cudaGetDeviceProperties(properties, device);
}
#endif
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

}  // extern "C"
