/* Against the echo server of wire/tests: `echo PORT`. Bulk data both ways beside requests, and errors. */
#include "wrenn_wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEALTH = 0x0010, HEALTH_REPLY = 0x0011, HOST_STATUS = 0x0120 };
#define PART 100000u

static struct wrenn_client *client;

static void check(int ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "c: %s: %s\n", what, wrenn_error(client));
    exit(1);
}

static struct wrenn_event next(uint32_t stream) {
    struct wrenn_event event;
    check(stream && wrenn_next(client, stream, &event) == 0, "next event");
    return event;
}

static void health(void) {
    uint32_t stream = wrenn_open(client, HEALTH, NULL, 1);
    struct wrenn_event event = next(stream);
    check(event.type == WRENN_EVENT_MESSAGE && event.kind == HEALTH_REPLY, "health");
    check(!wrenn_check_message(event.kind, event.data, event.length, NULL), "the answer's form");
    check(next(stream).type == WRENN_EVENT_FINISHED, "end of health");
}

int main(int argc, char **argv) {
    static const char secret[] = "wrn_0123456789abcdef0123456789abcdef";
    static uint8_t part[PART], back[PART + 65536];
    const char *port = argc > 1 ? argv[1] : "";
    char error[256];
    uint32_t stream;
    struct wrenn_event event;
    if (wrenn_connect("127.0.0.1", port, "key", "guess", 5, 20000, error, sizeof error)) {
        fprintf(stderr, "c: a wrong secret was let in\n");
        return 1;
    }
    client = wrenn_connect("127.0.0.1", port, "key", secret, sizeof secret - 1, 20000, error, sizeof error);
    if (!client) {
        fprintf(stderr, "c: %s\n", error);
        return 1;
    }
    stream = wrenn_open(client, WRENN_DONE, NULL, 0);
    for (unsigned round = 0; round < 20; round++) {
        size_t have = 0;
        for (size_t i = 0; i < PART; i++) part[i] = (uint8_t)((i + round) % 251);
        check(!wrenn_send_data(client, stream, 1, part, PART), "send data");
        health();
        while (have < PART) {
            event = next(stream);
            check(event.type == WRENN_EVENT_DATA && event.channel == 1, "echo");
            memcpy(back + have, event.data, event.length);
            have += event.length;
        }
        check(have == PART && !memcmp(part, back, PART), "what came back");
    }
    check(!wrenn_finish(client, stream) && next(stream).type == WRENN_EVENT_FINISHED, "end of the echo");
    event = next(wrenn_open(client, HOST_STATUS, NULL, 1));
    check(event.type == WRENN_EVENT_RESET && event.kind == 11, "a reset");
    event = next(wrenn_open_in(client, "cl-none", HEALTH, NULL, 1));
    check(event.type == WRENN_EVENT_MESSAGE && event.kind == WRENN_ERROR, "an error");
    stream = wrenn_open(client, WRENN_DONE, NULL, 0);
    check(!wrenn_send_data(client, stream, 1, part, 50000) && !wrenn_cancel(client, stream, "enough"), "cancel");
    health();
    wrenn_close(client);
    puts("c: echo well");
    return 0;
}
