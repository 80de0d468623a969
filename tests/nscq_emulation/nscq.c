/*
 * libnvidia-nscq.so.2 for tests: what the agent loads, with the symbols, structs and return codes of nscq_attestation.h.
 *
 * Knows NSCQ's shape and nothing of switches: every call goes to the simulator (tests/nscq_emulation/__init__.py) through the
 * UNIX socket beside this file, which is opened for each call. Only labels are made here, as the driver makes them.
 *
 *   request    path or name of the function, NUL-padded to 128 bytes; 32 bytes, the session's input
 *   answer     i8 return code; u8 number of callbacks; of each: UUID, 16; i8 code; value, as long as the path has it
 *
 * Source: NVIDIA nvtrust, nscq_attestation.h, API 2.0.0 (names, structs, codes); open-gpu-kernel-modules, ioctl_nvswitch.h.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

typedef int8_t nscq_rc_t;
typedef void (*nscq_fn_t)(void);
typedef struct { uint8_t bytes[16]; } nscq_uuid_t;
typedef struct { char data[64]; } nscq_label_t;
typedef struct { uint32_t report_size; uint8_t report[0x2000]; } nscq_attestation_report_t;
typedef struct { uint8_t cert_chain[0x1400]; uint32_t cert_chain_size; } nscq_attestation_certificate_t;
typedef struct nscq_session_st { uint8_t input[32]; } *nscq_session_t;
typedef struct { nscq_rc_t rc; nscq_session_t session; } nscq_session_result_t;
_Static_assert(sizeof(nscq_attestation_report_t) == 0x2004, "report");
_Static_assert(sizeof(nscq_attestation_certificate_t) == 0x1404, "certificate");

enum { UNEXPECTED_VALUE = -5, UNSUPPORTED_DRV = -6, DRV = -7 };

const uint32_t nscq_api_version = 2u << 24;

static int connect_to_simulator(void)
{
    Dl_info here;
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if (dladdr((void *)connect_to_simulator, &here) == 0)
        return -1;
    const char *end = strrchr(here.dli_fname, '/');
    int length = end ? (int)(end - here.dli_fname) : 0;
    if (snprintf(address.sun_path, sizeof address.sun_path, "%.*s/nscq.sock", length, here.dli_fname)
        >= (int)sizeof address.sun_path)
        return -1;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static int receive(int fd, void *data, size_t size)
{
    return recv(fd, data, size, MSG_WAITALL) == (ssize_t)size;
}

static int ask(const char *name, const uint8_t *input, nscq_rc_t *code, uint8_t *callbacks)
{
    struct { char name[128]; uint8_t input[32]; } request = { 0 };
    int fd = connect_to_simulator();
    strncpy(request.name, name, sizeof request.name - 1);
    if (input)
        memcpy(request.input, input, sizeof request.input);
    if (fd < 0)
        *code = UNSUPPORTED_DRV;
    else if (send(fd, &request, sizeof request, MSG_NOSIGNAL) != sizeof request
             || !receive(fd, code, 1) || !receive(fd, callbacks, 1)) {
        *code = DRV;
        close(fd);
        fd = -1;
    }
    return fd;
}

static nscq_rc_t ask_for_code(const char *name)
{
    nscq_rc_t code;
    uint8_t callbacks;
    int fd = ask(name, NULL, &code, &callbacks);
    if (fd >= 0)
        close(fd);
    return code;
}

nscq_session_result_t nscq_session_create(uint32_t flags)
{
    nscq_session_result_t result = { ask_for_code(__func__), NULL };
    if (flags == 1)
        result.session = calloc(1, sizeof *result.session);
    return result;
}

void nscq_session_destroy(nscq_session_t session)
{
    free(session);
}

nscq_rc_t nscq_session_set_input(nscq_session_t session, uint32_t flags, void *input, uint32_t size)
{
    if (session == NULL || flags != 0 || size != sizeof session->input)
        return UNEXPECTED_VALUE;
    memcpy(session->input, input, size);
    return ask_for_code(__func__);
}

nscq_rc_t nscq_uuid_to_label(const nscq_uuid_t *uuid, nscq_label_t *label, uint32_t flags)
{
    char *at = label->data + sprintf(label->data, "SWX-");
    for (int i = 0; i < 16; i++)
        at += sprintf(at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02X" : "%02X", uuid->bytes[i]);
    return flags ? UNEXPECTED_VALUE : ask_for_code(__func__);
}

static int ends_with(const char *path, const char *end)
{
    size_t length = strlen(path), of_end = strlen(end);
    return length >= of_end && strcmp(path + length - of_end, end) == 0;
}

nscq_rc_t nscq_session_path_observe(nscq_session_t session, const char *path, nscq_fn_t callback, void *data, uint32_t flags)
{
    nscq_rc_t code;
    uint8_t callbacks;
    if (session == NULL || flags != 0)
        return UNEXPECTED_VALUE;
    int fd = ask(path, session->input, &code, &callbacks);
    if (fd < 0)
        return code;
    for (int i = 0; i < callbacks; i++) {
        nscq_uuid_t device, uuid;
        nscq_rc_t of_device;
        int8_t number;
        nscq_attestation_report_t report;
        nscq_attestation_certificate_t certificate;
        if (!receive(fd, &device, sizeof device) || !receive(fd, &of_device, 1))
            code = DRV;
        else if (ends_with(path, "/uuid") && receive(fd, &uuid, sizeof uuid))
            ((void (*)(const nscq_uuid_t *, nscq_rc_t, const nscq_uuid_t *, void *))callback)(&device, of_device, &uuid, data);
        else if (ends_with(path, "/certificate") && receive(fd, &certificate, sizeof certificate))
            ((void (*)(const nscq_uuid_t *, nscq_rc_t, nscq_attestation_certificate_t, void *))callback)(
                &device, of_device, certificate, data);
        else if (ends_with(path, "/attestation_report") && receive(fd, &report, sizeof report))
            ((void (*)(const nscq_uuid_t *, nscq_rc_t, nscq_attestation_report_t, void *))callback)(
                &device, of_device, report, data);
        else if (receive(fd, &number, 1))
            ((void (*)(const nscq_uuid_t *, nscq_rc_t, int8_t, void *))callback)(&device, of_device, number, data);
        else
            code = DRV;
    }
    close(fd);
    return code;
}
