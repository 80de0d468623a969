/*
 * libnvidia-ml.so.1 for tests: what nvidia-ml-py loads, with the symbols, structs and return codes of nvml.h.
 *
 * Knows NVML's shape and nothing of GPUs: every call goes to the simulator (tests/nvml_emulation/__init__.py) through the UNIX
 * socket beside this file, which is opened for each call, so that a fork shares nothing.
 *
 *   request    name, NUL-padded to 64 bytes; u32 handle, index or value; u32 size; what the caller's buffer holds
 *   answer     u32 return code; as many bytes as the request had, which go into the caller's buffer when the code is 0
 *
 * Source: NVIDIA nvml.h 13 (names, structs, codes).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

typedef unsigned int nvmlReturn_t;
typedef struct nvmlDevice_st *nvmlDevice_t;

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, DRIVER_NOT_LOADED = 9, UNKNOWN = 999 };

typedef struct {
    unsigned int version, environment, ccFeature, devToolsMode, multiGpuMode;
} nvmlSystemConfComputeSettings_v1_t;
typedef struct {
    unsigned int certChainSize, attestationCertChainSize;
    unsigned char certChain[0x1000], attestationCertChain[0x1400];
} nvmlConfComputeGpuCertificate_t;
typedef struct {
    unsigned int isCecAttestationReportPresent, attestationReportSize, cecAttestationReportSize;
    unsigned char nonce[32], attestationReport[0x2000], cecAttestationReport[0x1000];
} nvmlConfComputeGpuAttestationReport_t;
_Static_assert(sizeof(nvmlSystemConfComputeSettings_v1_t) == 20, "settings");
_Static_assert(sizeof(nvmlConfComputeGpuCertificate_t) == 9224, "certificate");
_Static_assert(sizeof(nvmlConfComputeGpuAttestationReport_t) == 12332, "report");

static unsigned int initialised;

static int connect_to_simulator(void)
{
    Dl_info here;
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if (dladdr((void *)connect_to_simulator, &here) == 0)
        return -1;
    const char *end = strrchr(here.dli_fname, '/');
    int length = end ? (int)(end - here.dli_fname) : 0;
    if (snprintf(address.sun_path, sizeof address.sun_path, "%.*s/nvml.sock", length, here.dli_fname)
        >= (int)sizeof address.sun_path)
        return -1;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static int move(ssize_t (*some)(int, void *, size_t, int), int fd, void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = some(fd, (char *)data + done, size - done, MSG_NOSIGNAL);
        if (n <= 0)
            return 0;
        done += (size_t)n;
    }
    return 1;
}

static ssize_t send_some(int fd, void *data, size_t size, int flags)
{
    return send(fd, data, size, flags);
}

static nvmlReturn_t ask(const char *name, uint32_t value, void *buffer, uint32_t size)
{
    struct { char name[64]; uint32_t value, size; } request = { .value = value, .size = size };
    uint32_t code = UNKNOWN;
    unsigned char answer[sizeof(nvmlConfComputeGpuAttestationReport_t)];
    strncpy(request.name, name, sizeof request.name - 1);
    int fd = connect_to_simulator();
    if (fd < 0)
        return DRIVER_NOT_LOADED;
    if (size > sizeof answer
        || !move(send_some, fd, &request, sizeof request)
        || !move(send_some, fd, buffer, size)
        || !move(recv, fd, &code, sizeof code)
        || !move(recv, fd, answer, size))
        code = UNKNOWN;
    close(fd);
    if (code == SUCCESS && size > 0)
        memcpy(buffer, answer, size);
    return code;
}

#define CALL(value, buffer, size) \
    (!initialised ? UNINITIALIZED : ask(__func__, (uint32_t)(uintptr_t)(value), buffer, size))
#define FILL(value, buffer) ((buffer) == NULL ? INVALID_ARGUMENT : CALL(value, buffer, sizeof *(buffer)))

nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    nvmlReturn_t code = ask(__func__, flags, NULL, 0);
    initialised += code == SUCCESS;
    return code;
}

nvmlReturn_t nvmlShutdown(void)
{
    return initialised ? (initialised--, SUCCESS) : UNINITIALIZED;
}

const char *nvmlErrorString(nvmlReturn_t code)
{
    return code == SUCCESS ? "Success" : "Error of the emulation";
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    return version ? CALL(0, version, length) : INVALID_ARGUMENT;
}

nvmlReturn_t nvmlSystemGetConfComputeSettings(nvmlSystemConfComputeSettings_v1_t *settings)
{
    return FILL(0, settings);
}

nvmlReturn_t nvmlSystemGetConfComputeGpusReadyState(unsigned int *accepting)
{
    return FILL(0, accepting);
}

nvmlReturn_t nvmlSystemSetConfComputeGpusReadyState(unsigned int accepting)
{
    return CALL(accepting, NULL, 0);
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count)
{
    return FILL(0, count);
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device)
{
    return FILL(index, device);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length)
{
    return device && uuid ? CALL(device, uuid, length) : INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t device, unsigned int *architecture)
{
    return device ? FILL(device, architecture) : INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t device, char *version, unsigned int length)
{
    return device && version ? CALL(device, version, length) : INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, unsigned int *mode)
{
    return device ? FILL(device, mode) : INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetConfComputeGpuCertificate(nvmlDevice_t device, nvmlConfComputeGpuCertificate_t *certificate)
{
    return device ? FILL(device, certificate) : INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetConfComputeGpuAttestationReport(nvmlDevice_t device, nvmlConfComputeGpuAttestationReport_t *report)
{
    return device ? FILL(device, report) : INVALID_ARGUMENT;
}
