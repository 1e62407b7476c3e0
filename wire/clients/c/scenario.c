/* What a client does, against a live control plane:
 *     WRENN_API_KEY=wrn_... scenario HOST PORT KEY_ID [TEMPLATE]
 * Makes a capsule, streams a command, sends a file both ways, holds a terminal session, cancels, and
 * destroys the capsule. The key is taken from the environment so that it is in no process list. */
#define _POSIX_C_SOURCE 200809L
#include "wrenn_wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FILE_BYTES 3000000u
#define TIMEOUT_MS 120000

enum {
    CAPSULE_CREATE = 0x0100, CAPSULE_INFO = 0x0101, CAPSULE_DESTROY = 0x0102, PROCESS_START = 0x0200,
    PROCESS_STARTED = 0x0201, PROCESS_EXITED = 0x0202, PROCESS_SIGNAL = 0x0203, TERMINAL_RESIZE = 0x0208,
    FILE_READ = 0x0300, FILE_WRITE = 0x0301, FILE_ENTRY = 0x0310
};

static struct wrenn_client *client;
static char capsule[256];

static void give_up(const char *step, const char *why) {
    fprintf(stderr, "c: %s: %s\n", step, why);
    if (capsule[0]) {
        struct wrenn_buffer body = {0};
        wrenn_put_text(&body, capsule);
        wrenn_open(client, CAPSULE_DESTROY, &body, 1);
    }
    exit(1);
}

static void check(int ok, const char *step) {
    if (!ok) give_up(step, wrenn_error(client)[0] ? wrenn_error(client) : "not as expected");
}

/* The stream's next message, which has to be this one. */
static struct wrenn_reader message(uint32_t stream, uint16_t kind, const char *step) {
    struct wrenn_event event;
    struct wrenn_reader r = {0};
    check(stream && wrenn_next(client, stream, &event) == 0, step);
    if (event.type == WRENN_EVENT_RESET) give_up(step, "the stream was reset");
    r = (struct wrenn_reader){event.data, event.length, 0};
    if (event.type == WRENN_EVENT_MESSAGE && event.kind == WRENN_ERROR) {
        size_t n;
        char text[256];
        const uint8_t *reason;
        wrenn_get_number(&r, 2);
        wrenn_get_number(&r, 4);
        reason = wrenn_get_bytes(&r, &n);
        snprintf(text, sizeof text, "%.*s", (int)n, reason ? (const char *)reason : "");
        give_up(step, text);
    }
    check(event.type == WRENN_EVENT_MESSAGE && event.kind == kind, step);
    return r;
}

/* All bytes of a channel up to this message, whose body is in `last`, or (0) the end of the stream. */
static struct wrenn_buffer collect(uint32_t stream, uint8_t channel, uint16_t kind, struct wrenn_buffer *last) {
    struct wrenn_buffer out = {0};
    struct wrenn_event event;
    int found = 0;
    for (;;) {
        check(wrenn_next(client, stream, &event) == 0, "collect");
        if (event.type == WRENN_EVENT_DATA && event.channel == channel) wrenn_put(&out, event.data, event.length);
        if (event.type == WRENN_EVENT_MESSAGE && event.kind == kind) {
            found = 1;
            if (last) wrenn_put(last, event.data, event.length);
        }
        if (event.type == WRENN_EVENT_FINISHED || event.type == WRENN_EVENT_RESET) break;
    }
    check(found && !out.failed, "the last message of a stream");
    return out;
}

static uint32_t start(const char *const *argv, int columns, int rows, int takes_input) {
    struct wrenn_buffer body = {0};
    uint32_t count = 0, stream;
    while (argv[count]) count++;
    wrenn_put_number(&body, count, 4);
    for (uint32_t i = 0; i < count; i++) wrenn_put_text(&body, argv[i]);
    wrenn_put_number(&body, 0, 4); /* environment */
    wrenn_put_text(&body, "");     /* cwd */
    wrenn_put_text(&body, "");     /* user */
    wrenn_put_text(&body, "");     /* tag */
    wrenn_put_number(&body, 0, 4); /* timeout_ms */
    wrenn_put_number(&body, 0, 1); /* detached */
    wrenn_put_number(&body, (uint64_t)takes_input, 1);
    wrenn_put_number(&body, (uint64_t)columns, 2);
    wrenn_put_number(&body, (uint64_t)rows, 2);
    stream = wrenn_open_in(client, capsule, PROCESS_START, &body, !takes_input);
    wrenn_free(&body);
    return stream;
}

static void command(void) {
    static const char *const argv[] = {"/bin/sh", "-c", "for i in 1 2 3; do echo line $i; done; exit 7", NULL};
    static const char wanted[] = "line 1\nline 2\nline 3\n";
    uint32_t stream = start(argv, 0, 0, 0);
    struct wrenn_buffer last = {0}, out;
    message(stream, PROCESS_STARTED, "start a command");
    out = collect(stream, WRENN_STDOUT, PROCESS_EXITED, &last);
    check(out.length == sizeof wanted - 1 && !memcmp(out.data, wanted, out.length), "a command's output");
    check(last.length > 4 && last.data[3] == 7, "a command's exit code");
    wrenn_free(&out);
    wrenn_free(&last);
    puts("c: streamed a command");
}

static void files(void) {
    static uint8_t content[FILE_BYTES];
    struct wrenn_buffer body = {0}, back;
    uint32_t stream;
    for (uint32_t i = 0; i < FILE_BYTES; i++) content[i] = (uint8_t)(i * 7 % 251);
    wrenn_put_text(&body, "/tmp/wire-c");
    wrenn_put_text(&body, "");
    wrenn_put_number(&body, 0644, 4);
    stream = wrenn_open_in(client, capsule, FILE_WRITE, &body, 0);
    check(stream && !wrenn_send_data(client, stream, WRENN_FILE, content, FILE_BYTES) && !wrenn_finish(client, stream),
          "send a file");
    message(stream, FILE_ENTRY, "send a file");
    body.length = 0;
    wrenn_put_text(&body, "/tmp/wire-c");
    wrenn_put_text(&body, "");
    wrenn_put_number(&body, 0, 8);
    wrenn_put_number(&body, 0, 8);
    stream = wrenn_open_in(client, capsule, FILE_READ, &body, 1);
    message(stream, FILE_ENTRY, "fetch a file");
    back = collect(stream, WRENN_FILE, WRENN_DONE, NULL);
    check(back.length == FILE_BYTES && !memcmp(back.data, content, FILE_BYTES), "the file that came back");
    wrenn_free(&back);
    wrenn_free(&body);
    printf("c: sent a file of %u bytes both ways\n", FILE_BYTES);
}

static void terminal(void) {
    static const char *const argv[] = {"/bin/sh", NULL};
    static const char typed[] = "stty size; exit\n";
    uint32_t stream = start(argv, 80, 24, 1);
    struct wrenn_buffer body = {0}, out;
    message(stream, PROCESS_STARTED, "start a terminal");
    wrenn_put_number(&body, 100, 2);
    wrenn_put_number(&body, 40, 2);
    check(!wrenn_send(client, stream, TERMINAL_RESIZE, &body, 0), "resize the terminal");
    check(!wrenn_send_data(client, stream, WRENN_TERMINAL, typed, sizeof typed - 1), "type");
    out = collect(stream, WRENN_TERMINAL, PROCESS_EXITED, NULL);
    wrenn_put(&out, "", 1);
    check(strstr((const char *)out.data, "40 100") != NULL, "the terminal's size");
    wrenn_free(&out);
    wrenn_free(&body);
    puts("c: held a terminal session");
}

static void cancel(void) {
    static const char *const argv[] = {"/bin/sleep", "1000", NULL};
    uint32_t stream = start(argv, 0, 0, 0);
    struct wrenn_reader r = message(stream, PROCESS_STARTED, "start a process to cancel");
    unsigned pid = (unsigned)wrenn_get_number(&r, 4);
    char shell[64];
    const char *test[] = {"/bin/sh", "-c", shell, NULL};
    check(!wrenn_cancel(client, stream, "enough"), "cancel");
    snprintf(shell, sizeof shell, "kill -0 %u", pid);
    for (int i = 0; i < 100; i++) {
        struct timespec pause = {0, 100000000};
        struct wrenn_buffer last = {0}, out;
        stream = start(test, 0, 0, 0);
        message(stream, PROCESS_STARTED, "look for the process");
        out = collect(stream, WRENN_STDOUT, PROCESS_EXITED, &last);
        wrenn_free(&out);
        if (last.length > 4 && last.data[3] != 0) {
            wrenn_free(&last);
            puts("c: cancelled a process");
            return;
        }
        wrenn_free(&last);
        nanosleep(&pause, NULL);
    }
    give_up("cancel", "the process outlives its stream");
}

int main(int argc, char **argv) {
    const char *key = getenv("WRENN_API_KEY"), *id;
    char error[256];
    struct wrenn_buffer body = {0};
    struct wrenn_reader r;
    uint32_t stream;
    size_t n;
    if (argc < 4 || !key) {
        fprintf(stderr, "usage: WRENN_API_KEY=... scenario HOST PORT KEY_ID [TEMPLATE]\n");
        return 2;
    }
    if (wrenn_connect(argv[1], argv[2], argv[3], "wrn_wrong", 9, TIMEOUT_MS, error, sizeof error)) {
        fprintf(stderr, "c: a wrong key was let in\n");
        return 1;
    }
    puts("c: a wrong key is refused");
    client = wrenn_connect(argv[1], argv[2], argv[3], key, strlen(key), TIMEOUT_MS, error, sizeof error);
    if (!client) {
        fprintf(stderr, "c: %s\n", error);
        return 1;
    }
    puts("c: authenticated");
    wrenn_put_text(&body, "");
    wrenn_put_text(&body, argc > 4 ? argv[4] : "minimal");
    wrenn_put_number(&body, 1, 4);   /* vcpus */
    wrenn_put_number(&body, 256, 4); /* memory_mb */
    wrenn_put_number(&body, 0, 4);   /* disk_size_mb */
    wrenn_put_number(&body, 0, 4);   /* timeout_sec */
    wrenn_put_number(&body, 0, 4);   /* deadline_ms */
    wrenn_put_number(&body, 0, 1);   /* allow_internet */
    wrenn_put_number(&body, 0, 4);   /* environment */
    stream = wrenn_open(client, CAPSULE_CREATE, &body, 1);
    r = message(stream, CAPSULE_INFO, "create a capsule");
    id = (const char *)wrenn_get_bytes(&r, &n);
    check(id && n < sizeof capsule, "the capsule's id");
    memcpy(capsule, id, n);
    printf("c: created %s\n", capsule);
    command();
    files();
    terminal();
    cancel();
    body.length = 0;
    wrenn_put_text(&body, capsule);
    stream = wrenn_open(client, CAPSULE_DESTROY, &body, 1);
    message(stream, WRENN_DONE, "destroy the capsule");
    puts("c: destroyed it");
    wrenn_free(&body);
    wrenn_close(client);
    return 0;
}
