#define _POSIX_C_SOURCE 200809L
#include "wrenn_wire.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define HEADER_LEN 12
#define MAC_LEN 16
#define MAX_PAYLOAD 65536u
#define MAX_HANDSHAKE_PAYLOAD 1200u
#define MAX_AUTH_MESSAGE 1024u
#define MAX_DATA 32768u
#define MAX_EXTENSIONS 64
#define MAX_REASON 1024u
#define MAX_NAME 128u
#define MAX_STREAMS 64
#define FRAME_CHARGE 32u
#define MIN_WINDOW 131136u
#define MAX_WINDOW (1u << 30)
#define STREAM_WINDOW (256u * 1024)
#define CONNECTION_WINDOW (2u * 1024 * 1024)
#define MIN_ROUNDS 4096
#define MAX_ROUNDS 16384
#define PING_AFTER_MS 15000
#define GS2_HEADER "p=wrenn-hello-sha256,,"

enum { HELLO = 1, AUTH, OPEN = 0x10, MESSAGE, DATA, CREDIT, RESET, PING = 0x20, PONG, GOAWAY };

/* messages: begin (WRENN_BLESS=1 cargo test -p wrenn-wire --test protocol writes them) */
static const struct { uint16_t kind; const char *name, *fields; } MESSAGES[] = {
    {0x0001, "Error", "code u16; errno u32; text text"},
    {0x0002, "Done", ""},
    {0x0010, "Health", ""},
    {0x0011, "HealthReply", "version text; uptime_ms u64"},
    {0x0100, "CapsuleCreate", "capsule_id text; template text; vcpus u32; memory_mb u32; disk_size_mb u32; timeout_sec u32; deadline_ms u32; allow_internet bool; environment list<pair<bytes, bytes>>"},
    {0x0101, "CapsuleInfo", "capsule_id text; state state; template text; vcpus u32; memory_mb u32; disk_size_mb u32; disk_used_mb u32; guest_ip text; host_ip text; metadata list<pair<text, text>>"},
    {0x0102, "CapsuleDestroy", "capsule_id text"},
    {0x0103, "CapsuleGet", "capsule_id text"},
    {0x0104, "CapsuleList", ""},
    {0x0110, "Forward", "capsule_id text"},
    {0x0120, "HostStatus", ""},
    {0x0121, "HostStatusReply", "version text; arch text; cpu_cores u32; memory_mb u32; memory_reserved_mb u32; vcpus_reserved u32; disk_mb u64; disk_free_mb u64; vmm text; templates list<text>"},
    {0x0130, "CapsulePause", "capsule_id text"},
    {0x0131, "CapsuleResume", "capsule_id text; deadline_ms u32"},
    {0x0132, "CapsulePing", "capsule_id text"},
    {0x0133, "CapsuleSnapshot", "capsule_id text; name text; overwrite bool"},
    {0x0134, "SnapshotInfo", "name text; vcpus u32; memory_mb u32; disk_size_mb u32; size_bytes u64; created_us u64"},
    {0x0135, "SnapshotList", ""},
    {0x0136, "SnapshotDelete", "name text"},
    {0x0140, "CapsuleNetwork", "capsule_id text; revision u64; allow_internet bool; allow list<text>; deny list<text>; egress_kbit u32; egress_packets u32; ingress_kbit u32; ingress_packets u32"},
    {0x0141, "CapsuleMetrics", "capsule_id text; range_sec u32"},
    {0x0142, "CapsuleMetricsReply", "times list<u64>; cpu list<u32>; memory list<u64>; disk list<u64>"},
    {0x0200, "ProcessStart", "argv list<bytes>; environment list<pair<bytes, bytes>>; cwd bytes; user text; tag text; timeout_ms u32; detached bool; stdin bool; terminal_columns u16; terminal_rows u16"},
    {0x0201, "ProcessStarted", "pid u32; tag text"},
    {0x0202, "ProcessExited", "exit_code u32; signal u32; timed_out bool; duration_ms u64"},
    {0x0203, "ProcessSignal", "selector text; signal u32"},
    {0x0204, "ProcessList", ""},
    {0x0205, "ProcessListReply", "processes list<pair<pair<u32, text>, list<bytes>>>"},
    {0x0206, "ProcessAttach", "selector text; from_byte u64"},
    {0x0207, "ProcessAttached", "pid u32; tag text; from_byte u64"},
    {0x0208, "TerminalResize", "columns u16; rows u16"},
    {0x0209, "ProcessEndInput", ""},
    {0x0300, "FileRead", "path bytes; user text; offset u64; length u64"},
    {0x0301, "FileWrite", "path bytes; user text; mode u32"},
    {0x0302, "FileStat", "path bytes; user text"},
    {0x0303, "FileList", "path bytes; user text; depth u32"},
    {0x0304, "FileMakeDirectory", "path bytes; user text; mode u32"},
    {0x0305, "FileMove", "from bytes; to bytes; user text"},
    {0x0306, "FileRemove", "path bytes; user text"},
    {0x0310, "FileEntry", "path bytes; mode u32; size u64; owner text; group text; modified_sec i64; symlink_target bytes"},
    {0x0320, "FileWatch", "path bytes; user text; recursive bool"},
    {0x0321, "FileChange", "change u8; path bytes; from bytes; is_directory bool"},
    {0x0400, "GuestInit", "time_us u64; default_user text; environment list<pair<bytes, bytes>>; entropy bytes"},
    {0x0401, "GuestPrepareSnapshot", ""},
    {0x0410, "GuestMetrics", ""},
    {0x0411, "GuestMetricsReply", "at_ms u64; processors u32; busy_ms u64; idle_ms u64; memory_total_bytes u64; memory_available_bytes u64; disk_total_bytes u64; disk_available_bytes u64; network_received_bytes u64; network_sent_bytes u64; load_1m_thousandths u32; processes u32"},
    {0x0412, "GuestMetricsHistory", "after_ms u64"},
    {0x0420, "PortConnect", "port u16"},
    {0x0421, "PortList", ""},
    {0x0422, "PortListReply", "ports list<pair<u16, bool>>"},
    {0x0423, "PortWatch", ""},
    {0x0424, "PortChange", "port u16; listening bool; loopback_only bool; user u32; pid u32"},
};
/* messages: end */

/* Buffers. */

void wrenn_put(struct wrenn_buffer *b, const void *data, size_t length) {
    if (b->failed || length == 0) return;
    if (length > b->capacity - b->length) {
        size_t capacity = (b->length + length) * 2;
        uint8_t *grown = realloc(b->data, capacity);
        if (!grown) {
            b->failed = 1;
            return;
        }
        b->data = grown;
        b->capacity = capacity;
    }
    memcpy(b->data + b->length, data, length);
    b->length += length;
}

void wrenn_put_number(struct wrenn_buffer *b, uint64_t value, int bytes) {
    uint8_t raw[8];
    for (int i = 0; i < bytes; i++) raw[i] = (uint8_t)(value >> (8 * (bytes - 1 - i)));
    wrenn_put(b, raw, (size_t)bytes);
}

void wrenn_put_bytes(struct wrenn_buffer *b, const void *data, size_t length) {
    wrenn_put_number(b, length, 4);
    wrenn_put(b, data, length);
}

void wrenn_put_text(struct wrenn_buffer *b, const char *text) { wrenn_put_bytes(b, text, strlen(text)); }

void wrenn_free(struct wrenn_buffer *b) {
    free(b->data);
    memset(b, 0, sizeof *b);
}

static void put_string(struct wrenn_buffer *b, const char *text) { wrenn_put(b, text, strlen(text)); }

static void drop_front(struct wrenn_buffer *b, size_t n) {
    if (n < b->length) memmove(b->data, b->data + n, b->length - n);
    b->length -= n;
}

uint64_t wrenn_get_number(struct wrenn_reader *r, int bytes) {
    uint64_t value = 0;
    if (r->failed || r->left < (size_t)bytes) {
        r->failed = 1;
        return 0;
    }
    for (int i = 0; i < bytes; i++) value = value << 8 | r->data[i];
    r->data += bytes;
    r->left -= (size_t)bytes;
    return value;
}

const uint8_t *wrenn_get_bytes(struct wrenn_reader *r, size_t *length) {
    const uint8_t *start;
    *length = wrenn_get_number(r, 4);
    if (r->failed || *length > r->left) {
        r->failed = 1;
        *length = 0;
        return NULL;
    }
    start = r->data;
    r->data += *length;
    r->left -= *length;
    return start;
}

/* SHA-256 (FIPS 180-4) and HMAC (RFC 2104). */

struct sha256 {
    uint32_t state[8];
    uint64_t length;
    uint8_t block[64];
};

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha256_block(uint32_t *s, const uint8_t *p) {
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    memcpy(v, s, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t e = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
        uint32_t t1 = v[7] + e + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
        uint32_t a = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
        uint32_t t2 = a + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) s[i] += v[i];
}

static void sha256_start(struct sha256 *h) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(h->state, start, sizeof start);
    h->length = 0;
}

static void sha256_add(struct sha256 *h, const void *data, size_t length) {
    const uint8_t *p = data;
    while (length > 0) {
        size_t at = h->length % 64, n = 64 - at < length ? 64 - at : length;
        memcpy(h->block + at, p, n);
        h->length += n;
        p += n;
        length -= n;
        if (h->length % 64 == 0) sha256_block(h->state, h->block);
    }
}

static void sha256_end(struct sha256 *h, uint8_t out[32]) {
    uint64_t bits = h->length * 8;
    uint8_t tail[72] = {0x80};
    size_t padding = 1 + (119 - h->length % 64) % 64;
    for (int i = 0; i < 8; i++) tail[padding + (size_t)i] = (uint8_t)(bits >> (56 - 8 * i));
    sha256_add(h, tail, padding + 8);
    for (int i = 0; i < 32; i++) out[i] = (uint8_t)(h->state[i / 4] >> (24 - 8 * (i % 4)));
}

struct hmac {
    struct sha256 inner, outer;
};

static void hmac_key(struct hmac *m, const void *key, size_t length) {
    uint8_t block[64] = {0};
    if (length > 64) {
        sha256_start(&m->inner);
        sha256_add(&m->inner, key, length);
        sha256_end(&m->inner, block);
    } else if (length > 0) {
        memcpy(block, key, length);
    }
    for (int i = 0; i < 64; i++) block[i] ^= 0x36;
    sha256_start(&m->inner);
    sha256_add(&m->inner, block, 64);
    for (int i = 0; i < 64; i++) block[i] ^= 0x36 ^ 0x5c;
    sha256_start(&m->outer);
    sha256_add(&m->outer, block, 64);
}

/* `keyed` is not changed, so one key serves many times. */
static void hmac_of(const struct hmac *keyed, const void *a, size_t a_length, const void *b, size_t b_length,
                    uint8_t out[32]) {
    struct hmac m = *keyed;
    sha256_add(&m.inner, a, a_length);
    sha256_add(&m.inner, b, b_length);
    sha256_end(&m.inner, out);
    sha256_add(&m.outer, out, 32);
    sha256_end(&m.outer, out);
}

static void hmac_once(const void *key, size_t key_length, const void *data, size_t length, uint8_t out[32]) {
    struct hmac m;
    hmac_key(&m, key, key_length);
    hmac_of(&m, data, length, NULL, 0, out);
}

static int is_equal(const uint8_t *a, const uint8_t *b, size_t length) {
    volatile uint8_t difference = 0;
    for (size_t i = 0; i < length; i++) difference |= a[i] ^ b[i];
    return difference == 0;
}

/* Base64 (RFC 4648), strict. */

static const char ALPHABET[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static void put_base64(struct wrenn_buffer *b, const uint8_t *data, size_t length) {
    for (size_t i = 0; i < length; i += 3) {
        size_t n = length - i < 3 ? length - i : 3;
        uint32_t group = (uint32_t)data[i] << 16;
        char out[4] = {'=', '=', '=', '='};
        if (n > 1) group |= (uint32_t)data[i + 1] << 8;
        if (n > 2) group |= data[i + 2];
        for (size_t k = 0; k <= n; k++) out[k] = ALPHABET[group >> (18 - 6 * k) & 63];
        wrenn_put(b, out, 4);
    }
}

/* The length of what `text` decodes to, or -1. `out` has room for the text's length. */
static int get_base64(const char *text, size_t length, uint8_t *out) {
    size_t n = 0;
    if (length % 4) return -1;
    for (size_t i = 0; i < length; i += 4) {
        uint32_t group = 0;
        size_t padding = 0;
        for (size_t k = 0; k < 4; k++) {
            const char *at = text[i + k] ? strchr(ALPHABET, text[i + k]) : NULL;
            if (text[i + k] == '=' && i + 4 == length && k >= 2) {
                padding++;
                group <<= 6;
            } else if (at && padding == 0) {
                group = group << 6 | (uint32_t)(at - ALPHABET);
            } else {
                return -1;
            }
        }
        if ((padding >= 1 && (group & 0xff)) || (padding == 2 && (group & 0xff00))) return -1;
        for (size_t k = 0; k < 3 - padding; k++) out[n++] = (uint8_t)(group >> (16 - 8 * k));
    }
    return (int)n;
}

/* Messages, by the types' names. */

static int is_utf8(const uint8_t *s, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t more = s[i] < 0x80 ? 0 : s[i] >= 0xc2 && s[i] < 0xe0 ? 1 : s[i] >= 0xe0 && s[i] < 0xf0 ? 2 : 3;
        if (s[i] >= 0x80 && (s[i] < 0xc2 || s[i] > 0xf4)) return 0;
        if (more >= n - i && more > 0) return 0;
        for (size_t k = 1; k <= more; k++)
            if ((s[i + k] & 0xc0) != 0x80) return 0;
        if (more >= 2) {
            unsigned second = s[i + 1];
            if ((s[i] == 0xe0 && second < 0xa0) || (s[i] == 0xed && second > 0x9f) ||
                (s[i] == 0xf0 && second < 0x90) || (s[i] == 0xf4 && second > 0x8f))
                return 0;
        }
        i += more + 1;
    }
    return 1;
}

/* Where the type at `type` ends: a comma, '>', ';' or the end, outside its own brackets. */
static const char *type_end(const char *type) {
    int depth = 0;
    for (; *type; type++) {
        if (depth == 0 && (*type == ',' || *type == '>' || *type == ';')) return type;
        depth += (*type == '<') - (*type == '>');
    }
    return type;
}

static void put_json(struct wrenn_buffer *json, const char *text) {
    if (json) put_string(json, text);
}

static const char *check_value(const char *type, struct wrenn_reader *r, struct wrenn_buffer *json) {
    char number[24];
    const char *error;
    if (!strncmp(type, "list<", 5)) {
        uint64_t count = wrenn_get_number(r, 4);
        if (r->failed || count > r->left) return "unexpected_end";
        put_json(json, "[");
        for (uint64_t i = 0; i < count; i++) {
            if (i) put_json(json, ",");
            if ((error = check_value(type + 5, r, json))) return error;
        }
        put_json(json, "]");
    } else if (!strncmp(type, "option<", 7)) {
        uint64_t marker = wrenn_get_number(r, 1);
        if (r->failed) return "unexpected_end";
        if (marker > 1) return "bad_marker";
        if (marker) return check_value(type + 7, r, json);
        put_json(json, "null");
    } else if (!strncmp(type, "pair<", 5)) {
        put_json(json, "[");
        if ((error = check_value(type + 5, r, json))) return error;
        put_json(json, ",");
        if ((error = check_value(type_end(type + 5) + 2, r, json))) return error;
        put_json(json, "]");
    } else if (!strncmp(type, "bool", 4) || !strncmp(type, "state", 5)) {
        uint64_t value = wrenn_get_number(r, 1);
        if (r->failed) return "unexpected_end";
        if (*type == 'b' && value > 1) return "bad_marker";
        if (*type == 's' && value > 11) return "bad_value";
        snprintf(number, sizeof number, "%u", (unsigned)value);
        put_json(json, *type == 's' ? number : value ? "true" : "false");
    } else if (!strncmp(type, "text", 4) || !strncmp(type, "bytes", 5)) {
        size_t length;
        const uint8_t *data = wrenn_get_bytes(r, &length);
        if (r->failed) return "unexpected_end";
        if (*type == 't' && !is_utf8(data, length)) return "not_utf8";
        put_json(json, "\"");
        for (size_t i = 0; json && i < length; i++) {
            if (*type == 'b') {
                snprintf(number, sizeof number, "%02x", data[i]);
                put_string(json, number);
            } else if (data[i] == '"' || data[i] == '\\') {
                wrenn_put(json, "\\", 1);
                wrenn_put(json, data + i, 1);
            } else if (data[i] < 0x20) {
                snprintf(number, sizeof number, "\\u%04x", data[i]);
                put_string(json, number);
            } else {
                wrenn_put(json, data + i, 1);
            }
        }
        put_json(json, "\"");
    } else {
        int bytes = atoi(type + 1) / 8;
        uint64_t value = wrenn_get_number(r, bytes);
        if (r->failed) return "unexpected_end";
        if (*type == 'i') {
            int64_t number_signed = bytes == 4 ? (int64_t)(int32_t)(uint32_t)value : (int64_t)value;
            snprintf(number, sizeof number, "%lld", (long long)number_signed);
        } else {
            snprintf(number, sizeof number, "%llu", (unsigned long long)value);
        }
        put_json(json, number);
    }
    return NULL;
}

static const char *check_extensions(struct wrenn_reader *r) {
    uint64_t count = wrenn_get_number(r, 2);
    if (!r->failed && count > MAX_EXTENSIONS) return "too_long";
    for (uint64_t i = 0; i < count && !r->failed; i++) {
        size_t length;
        uint64_t tag = wrenn_get_number(r, 2);
        wrenn_get_bytes(r, &length);
        if (!r->failed && tag >= 0x8000) return "unknown_critical_field";
    }
    if (r->failed) return "unexpected_end";
    return r->left ? "trailing_bytes" : NULL;
}

const char *wrenn_check_message(uint16_t kind, const uint8_t *body, size_t length, struct wrenn_buffer *json) {
    struct wrenn_reader r = {body, length, 0};
    for (size_t i = 0; i < sizeof MESSAGES / sizeof *MESSAGES; i++) {
        const char *at = MESSAGES[i].fields, *error;
        if (MESSAGES[i].kind != kind) continue;
        while (*at) {
            size_t name = strcspn(at, " ");
            if (json) {
                put_string(json, "\"");
                wrenn_put(json, at, name);
                put_string(json, "\":");
            }
            if ((error = check_value(at + name + 1, &r, json))) return error;
            put_json(json, ",");
            at = type_end(at + name + 1);
            if (*at) at += 2;
        }
        return check_extensions(&r);
    }
    return "unknown_message";
}

const char *wrenn_check_header(const uint8_t bytes[12], struct wrenn_header *h) {
    struct wrenn_reader r = {bytes, HEADER_LEN, 0};
    uint8_t flags;
    int on_connection;
    h->length = (uint32_t)wrenn_get_number(&r, 4);
    h->stream = (uint32_t)wrenn_get_number(&r, 4);
    h->type = (uint8_t)wrenn_get_number(&r, 1);
    flags = (uint8_t)wrenn_get_number(&r, 1);
    h->fin = flags & 1;
    if (h->length > MAX_PAYLOAD) return "too_long";
    if (!(h->type == HELLO || h->type == AUTH || (h->type >= OPEN && h->type <= RESET) ||
          (h->type >= PING && h->type <= GOAWAY)))
        return "unknown_type";
    if (flags & ~(h->type >= OPEN && h->type <= DATA ? 1 : 0)) return "bad_flags";
    if (wrenn_get_number(&r, 2)) return "bad_reserved";
    on_connection = h->type < OPEN || h->type > RESET;
    if (h->type != CREDIT && on_connection != (h->stream == 0)) return "bad_stream";
    return NULL;
}

/* The session. */

struct item {
    struct item *next;
    uint32_t stream;
    struct wrenn_event event;
    uint32_t cost;
    uint8_t data[];
};

struct stream {
    uint32_t id; /* 0: free */
    int64_t credit, left, owed;
    int sent_fin, got_fin;
};

enum step { AWAIT_HELLO, AWAIT_CHALLENGE, AWAIT_PROOF, READY, OVER };

struct wrenn_client {
    int socket, timeout_ms;
    enum step step;
    char error[256];
    struct wrenn_buffer input, output, secret, first_bare, auth_message;
    char identity[MAX_NAME + 1], nonce[25], binding[128];
    struct sha256 transcript;
    uint8_t expected[32], keys[2][32];
    struct hmac send_key, recv_key;
    uint64_t send_sequence, recv_sequence;
    int is_keyed;
    int64_t credit, window, left, owed;
    uint32_t stream_window, max_streams, next_stream, last_peer_stream;
    int going_away;
    struct stream streams[MAX_STREAMS];
    struct item *first, *last, *current;
};

static void put_frame(struct wrenn_client *c, uint8_t type, uint32_t stream, int fin, const void *a, size_t a_length,
                      const void *b, size_t b_length) {
    struct wrenn_buffer *out = &c->output;
    size_t start = out->length;
    wrenn_put_number(out, a_length + b_length, 4);
    wrenn_put_number(out, stream, 4);
    wrenn_put_number(out, type, 1);
    wrenn_put_number(out, fin != 0, 1);
    wrenn_put_number(out, 0, 2);
    wrenn_put(out, a, a_length);
    wrenn_put(out, b, b_length);
    if (c->is_keyed && !out->failed) {
        uint8_t sequence[8], mac[32];
        for (int i = 0; i < 8; i++) sequence[i] = (uint8_t)(c->send_sequence >> (56 - 8 * i));
        hmac_of(&c->send_key, sequence, 8, out->data + start, out->length - start, mac);
        wrenn_put(out, mac, MAC_LEN);
        c->send_sequence++;
    }
}

static void put_credit(struct wrenn_client *c, uint32_t stream, int64_t amount) {
    uint8_t raw[4];
    for (int i = 0; i < 4; i++) raw[i] = (uint8_t)(amount >> (24 - 8 * i));
    put_frame(c, CREDIT, stream, 0, raw, 4, NULL, 0);
}

static void put_reason(struct wrenn_buffer *b, uint16_t code, const char *reason) {
    size_t length = strlen(reason);
    wrenn_put_number(b, code, 2);
    wrenn_put_bytes(b, reason, length < MAX_REASON ? length : MAX_REASON);
}

static struct stream *find(struct wrenn_client *c, uint32_t id) {
    for (int i = 0; id && i < MAX_STREAMS; i++)
        if (c->streams[i].id == id) return &c->streams[i];
    return NULL;
}

static void release(struct wrenn_client *c, uint32_t id, uint32_t cost) {
    struct stream *s = find(c, id);
    int pressed = c->left < CONNECTION_WINDOW / 2;
    c->owed += cost;
    if (c->owed && (pressed || c->owed >= CONNECTION_WINDOW / 4)) {
        put_credit(c, 0, c->owed);
        c->left += c->owed;
        c->owed = 0;
    }
    if (!s || s->got_fin) return;
    s->owed += cost;
    if (s->owed && (pressed || s->owed >= STREAM_WINDOW / 4)) {
        put_credit(c, id, s->owed);
        s->left += s->owed;
        s->owed = 0;
    }
}

static const char *push(struct wrenn_client *c, uint32_t stream, enum wrenn_event_type type, uint16_t kind,
                        uint8_t channel, const uint8_t *data, size_t length, uint32_t cost) {
    struct item *item = malloc(sizeof *item + length);
    if (!item) return "no_memory";
    item->next = NULL;
    item->stream = stream;
    item->cost = cost;
    if (length) memcpy(item->data, data, length);
    item->event = (struct wrenn_event){type, kind, channel, item->data, length};
    if (c->last) c->last->next = item;
    else c->first = item;
    c->last = item;
    return NULL;
}

struct wrenn_client *wrenn_new(const char *identity, const void *secret, size_t secret_length,
                               const char *program, const uint8_t nonce[18]) {
    struct wrenn_client *c = calloc(1, sizeof *c);
    struct wrenn_buffer hello = {0}, text = {0};
    if (!c) return NULL;
    c->socket = -1;
    c->left = CONNECTION_WINDOW;
    c->next_stream = 1;
    snprintf(c->identity, sizeof c->identity, "%s", identity);
    wrenn_put(&c->secret, secret, secret_length);
    put_base64(&text, nonce, 18);
    if (!text.failed) memcpy(c->nonce, text.data, 24);
    wrenn_free(&text);
    wrenn_put_number(&hello, 1, 2);
    wrenn_put_number(&hello, 1, 2);
    wrenn_put_number(&hello, 0, 8);
    wrenn_put_number(&hello, STREAM_WINDOW, 4);
    wrenn_put_number(&hello, CONNECTION_WINDOW, 4);
    wrenn_put_number(&hello, 4096, 4);
    wrenn_put_text(&hello, program);
    wrenn_put_number(&hello, 0, 2);
    wrenn_put(&c->output, "\0WRENN\r\n", 8);
    put_frame(c, HELLO, 0, 0, hello.data, hello.length, NULL, 0);
    sha256_start(&c->transcript);
    sha256_add(&c->transcript, c->output.data, c->output.length);
    wrenn_free(&hello);
    return c;
}

struct wrenn_buffer *wrenn_output(struct wrenn_client *c) { return &c->output; }

static const char *on_hello(struct wrenn_client *c, const uint8_t *frame, const uint8_t *payload, size_t length) {
    struct wrenn_reader r = {payload, length, 0};
    uint64_t low = wrenn_get_number(&r, 2), high = wrenn_get_number(&r, 2), features = wrenn_get_number(&r, 8);
    uint64_t stream_window = wrenn_get_number(&r, 4), window = wrenn_get_number(&r, 4);
    uint8_t data[54];
    struct wrenn_buffer text = {0};
    size_t name_length;
    const uint8_t *name;
    c->max_streams = (uint32_t)wrenn_get_number(&r, 4);
    name = wrenn_get_bytes(&r, &name_length);
    if (r.failed || !is_utf8(name, name_length) || check_extensions(&r) || low > high || name_length > MAX_NAME ||
        stream_window < MIN_WINDOW || stream_window > MAX_WINDOW || window < MIN_WINDOW || window > MAX_WINDOW)
        return "payload";
    for (size_t i = 0; i < name_length; i++)
        if (name[i] < 0x20 || name[i] == 0x7f || (name[i] == 0xc2 && name[i + 1] < 0xa0)) return "payload";
    if (low > 1 || high < 1) return "no_common_version";
    if (low != high || features) return "unexpected";
    c->stream_window = (uint32_t)stream_window;
    c->credit = c->window = (int64_t)window;
    sha256_add(&c->transcript, frame, HEADER_LEN + length);
    memcpy(data, GS2_HEADER, 22);
    sha256_end(&c->transcript, data + 22);
    put_base64(&text, data, 54);
    wrenn_put(&text, "", 1);
    if (text.failed) return "no_memory";
    snprintf(c->binding, sizeof c->binding, "%s", (const char *)text.data);
    wrenn_free(&text);
    put_string(&c->first_bare, "n=");
    put_string(&c->first_bare, c->identity);
    put_string(&c->first_bare, ",r=");
    put_string(&c->first_bare, c->nonce);
    put_frame(c, AUTH, 0, 0, GS2_HEADER, 22, c->first_bare.data, c->first_bare.length);
    c->step = AWAIT_CHALLENGE;
    return NULL;
}

static const char *on_challenge(struct wrenn_client *c, const char *text, size_t length) {
    const char *nonce = text + 2, *salt, *rounds_text, *end = text + length;
    size_t nonce_length, salt_length, rounds_length, without_proof;
    uint8_t salt_raw[MAX_AUTH_MESSAGE + 4], salted[32], block[32], both[64], stored[32], signature[32], master[32];
    struct wrenn_buffer proof = {0}, *m = &c->auth_message;
    struct hmac keyed;
    int salt_bytes;
    long rounds = 0;
    if (length < 3 || strncmp(text, "r=", 2)) return "auth_malformed";
    nonce_length = strcspn(nonce, ",");
    salt = nonce + nonce_length;
    if (strncmp(salt, ",s=", 3)) return "auth_malformed";
    salt += 3;
    salt_length = strcspn(salt, ",");
    rounds_text = salt + salt_length;
    if (strncmp(rounds_text, ",i=", 3)) return "auth_malformed";
    rounds_text += 3;
    rounds_length = strcspn(rounds_text, ",");
    salt_bytes = get_base64(salt, salt_length, salt_raw);
    if (rounds_text + rounds_length != end || salt_bytes <= 0 || nonce_length < 24 || nonce_length > 128)
        return "auth_malformed";
    for (size_t i = 0; i < nonce_length; i++)
        if (nonce[i] < 0x21 || nonce[i] > 0x7e) return "auth_malformed";
    if (strncmp(nonce, c->nonce, 24) || nonce_length < 48) return "auth_nonce";
    for (size_t i = 0; i < rounds_length; i++) {
        if (rounds_text[i] < '0' || rounds_text[i] > '9' || rounds_length > 7 || *rounds_text == '0') return "auth_rounds";
        rounds = rounds * 10 + rounds_text[i] - '0';
    }
    if (rounds < MIN_ROUNDS || rounds > MAX_ROUNDS) return "auth_rounds";
    hmac_key(&keyed, c->secret.data, c->secret.length);
    hmac_of(&keyed, salt_raw, (size_t)salt_bytes, "\0\0\0\1", 4, block);
    memcpy(salted, block, 32);
    for (long i = 1; i < rounds; i++) {
        hmac_of(&keyed, block, 32, NULL, 0, block);
        for (int k = 0; k < 32; k++) salted[k] ^= block[k];
    }
    hmac_once(salted, 32, "Client Key", 10, both);
    hmac_once(salted, 32, "Server Key", 10, both + 32);
    wrenn_put(m, c->first_bare.data, c->first_bare.length);
    put_string(m, ",");
    wrenn_put(m, text, length);
    put_string(m, ",");
    without_proof = m->length;
    put_string(m, "c=");
    put_string(m, c->binding);
    put_string(m, ",r=");
    wrenn_put(m, nonce, nonce_length);
    if (m->failed) return "no_memory";
    sha256_start(&c->transcript);
    sha256_add(&c->transcript, both, 32);
    sha256_end(&c->transcript, stored);
    hmac_once(stored, 32, m->data, m->length, signature);
    hmac_once(both + 32, 32, m->data, m->length, c->expected);
    memcpy(block, "wrenn 1 session", 15);
    sha256_start(&c->transcript);
    sha256_add(&c->transcript, m->data, m->length);
    sha256_end(&c->transcript, master);
    hmac_key(&keyed, both, 64);
    hmac_of(&keyed, block, 15, master, 32, master);
    hmac_once(master, 32, "client to server", 16, c->keys[0]);
    hmac_once(master, 32, "server to client", 16, c->keys[1]);
    for (int i = 0; i < 32; i++) signature[i] ^= both[i];
    put_string(&proof, ",p=");
    put_base64(&proof, signature, 32);
    put_frame(c, AUTH, 0, 0, m->data + without_proof, m->length - without_proof, proof.data, proof.length);
    wrenn_free(&proof);
    c->step = AWAIT_PROOF;
    return NULL;
}

static const char *on_proof(struct wrenn_client *c, const char *text, size_t length) {
    uint8_t signature[MAX_AUTH_MESSAGE];
    int n;
    if (length < 2 || strncmp(text, "v=", 2)) return "auth_malformed";
    if ((n = get_base64(text + 2, length - 2, signature)) < 0) return "auth_malformed";
    if (n != 32 || !is_equal(signature, c->expected, 32)) return "auth_server";
    hmac_key(&c->send_key, c->keys[0], 32);
    hmac_key(&c->recv_key, c->keys[1], 32);
    memset(c->secret.data, 0, c->secret.length);
    wrenn_free(&c->secret);
    c->is_keyed = 1;
    c->step = READY;
    return NULL;
}

static const char *on_go_away(struct wrenn_client *c, const uint8_t *payload, size_t length) {
    struct wrenn_reader r = {payload, length, 0};
    uint32_t last = (uint32_t)wrenn_get_number(&r, 4);
    uint16_t code = (uint16_t)wrenn_get_number(&r, 2);
    size_t n;
    const uint8_t *reason = wrenn_get_bytes(&r, &n);
    const char *error = NULL;
    if (r.failed || r.left || n > MAX_REASON || !is_utf8(reason, n)) return "payload";
    if (c->step != READY || code != 15) {
        snprintf(c->error, sizeof c->error, "closed by the peer with code %u: %.*s", code, (int)(n < 180 ? n : 180),
                 n ? (const char *)reason : "");
        return "by_peer";
    }
    c->going_away = 1;
    for (int i = 0; i < MAX_STREAMS && !error; i++)
        if (c->streams[i].id > last) {
            error = push(c, c->streams[i].id, WRENN_EVENT_RESET, code, 0, reason, n, 0);
            c->streams[i].id = 0;
        }
    return error;
}

static void forget_if_done(struct stream *s) {
    if (s->sent_fin && s->got_fin) s->id = 0;
}

static const char *on_stream_frame(struct wrenn_client *c, const struct wrenn_header *h, const uint8_t *payload) {
    uint32_t cost = h->length ? h->length + FRAME_CHARGE : 0;
    struct stream *s = find(c, h->stream);
    const char *error = NULL;
    int plenty;
    if (h->length == 0 && !(h->type == DATA && h->fin)) return "unexpected";
    plenty = c->left >= CONNECTION_WINDOW / 2;
    if ((c->left -= cost) < 0) return "credit_exceeded";
    if (plenty && c->left < CONNECTION_WINDOW / 2) {
        /* The peer lets a stream hold little from here on: what it is owed must not hold it back. */
        for (int i = 0; i < MAX_STREAMS; i++)
            if (c->streams[i].id) release(c, c->streams[i].id, 0);
        release(c, 0, 0);
    }
    if (h->type == OPEN) {
        static const uint8_t unimplemented[6] = {0, 11, 0, 0, 0, 0};
        if (h->stream % 2 || h->stream <= c->last_peer_stream) return "unexpected";
        c->last_peer_stream = h->stream;
        release(c, 0, cost);
        put_frame(c, RESET, h->stream, 0, unimplemented, 6, NULL, 0);
        return NULL;
    }
    if (h->stream % 2 ? h->stream >= c->next_stream : h->stream > c->last_peer_stream) return "unexpected";
    if (!s) {
        release(c, 0, cost);
        return NULL;
    }
    if (s->got_fin) return "unexpected";
    if ((s->left -= cost) < 0) return "credit_exceeded";
    if (h->type == MESSAGE) {
        if (h->length < 2) return "payload";
        error = push(c, h->stream, WRENN_EVENT_MESSAGE, (uint16_t)(payload[0] << 8 | payload[1]), 0, payload + 2,
                     h->length - 2, cost);
    } else if (h->length == 1) {
        return "unexpected";
    } else if (h->length) {
        error = push(c, h->stream, WRENN_EVENT_DATA, 0, payload[0], payload + 1, h->length - 1, cost);
    }
    if (h->fin && !error) {
        s->got_fin = 1;
        error = push(c, h->stream, WRENN_EVENT_FINISHED, 0, 0, NULL, 0, 0);
        forget_if_done(s);
    }
    return error;
}

static const char *on_frame(struct wrenn_client *c, const struct wrenn_header *h, const uint8_t *payload) {
    struct stream *s = find(c, h->stream);
    struct wrenn_reader r = {payload, h->length, 0};
    if (h->type == HELLO || h->type == AUTH) return "unexpected";
    if (h->type == PING || h->type == PONG) {
        if (h->length != 8) return "payload";
        if (h->type == PING) put_frame(c, PONG, 0, 0, payload, 8, NULL, 0);
    } else if (h->type == CREDIT) {
        int64_t amount = (int64_t)wrenn_get_number(&r, 4);
        int64_t *credit = h->stream == 0 ? &c->credit : s ? &s->credit : NULL;
        if (r.failed || r.left) return "payload";
        if (credit) *credit += amount;
        if (amount == 0 || (credit && *credit > MAX_WINDOW)) return "unexpected";
    } else if (h->type == RESET) {
        uint16_t code = (uint16_t)wrenn_get_number(&r, 2);
        size_t n;
        const uint8_t *reason = wrenn_get_bytes(&r, &n);
        if (r.failed || r.left || n > MAX_REASON || !is_utf8(reason, n)) return "payload";
        if (s) {
            s->id = 0;
            return push(c, h->stream, WRENN_EVENT_RESET, code, 0, reason, n, 0);
        }
    } else {
        return on_stream_frame(c, h, payload);
    }
    return NULL;
}

/* Handles the first frame of the input and says how long it was; 0 when it is not all there. */
static const char *one_frame(struct wrenn_client *c, const uint8_t *data, size_t have, size_t *used) {
    struct wrenn_header h;
    char text[MAX_AUTH_MESSAGE + 1];
    size_t end;
    const uint8_t *payload = data + HEADER_LEN;
    *used = 0;
    if (have < HEADER_LEN) return NULL;
    if (wrenn_check_header(data, &h)) return "header";
    if (c->step < READY && h.length > MAX_HANDSHAKE_PAYLOAD) return "unexpected";
    end = HEADER_LEN + h.length;
    if (have < end + (c->is_keyed ? MAC_LEN : 0)) return NULL;
    *used = end + (c->is_keyed ? MAC_LEN : 0);
    if (c->is_keyed) {
        uint8_t sequence[8], mac[32];
        for (int i = 0; i < 8; i++) sequence[i] = (uint8_t)(c->recv_sequence >> (56 - 8 * i));
        hmac_of(&c->recv_key, sequence, 8, data, end, mac);
        if (!is_equal(mac, data + end, MAC_LEN)) return "integrity";
        c->recv_sequence++;
    }
    if (h.type == GOAWAY) return on_go_away(c, payload, h.length);
    if (c->step == READY) return on_frame(c, &h, payload);
    if (c->step == AWAIT_HELLO) return h.type == HELLO ? on_hello(c, data, payload, h.length) : "unexpected";
    if (h.type != AUTH) return "unexpected";
    if (h.length > MAX_AUTH_MESSAGE || memchr(payload, 0, h.length)) return "auth_malformed";
    memcpy(text, payload, h.length);
    text[h.length] = 0;
    return c->step == AWAIT_CHALLENGE ? on_challenge(c, text, h.length) : on_proof(c, text, h.length);
}

const char *wrenn_receive(struct wrenn_client *c, const uint8_t *data, size_t length) {
    const char *error = NULL;
    size_t at = 0, used;
    if (c->step == OVER) return "over";
    wrenn_put(&c->input, data, length);
    do {
        if (c->input.failed || c->output.failed) error = "no_memory";
        else error = one_frame(c, c->input.data + at, c->input.length - at, &used);
        at += error ? 0 : used;
    } while (!error && used);
    if (!error) {
        drop_front(&c->input, at);
        return NULL;
    }
    if (strcmp(error, "by_peer")) {
        struct wrenn_buffer payload = {0};
        int code = !strcmp(error, "integrity") ? 14 : !strncmp(error, "auth_", 5) ? 7 : 13;
        wrenn_put_number(&payload, c->last_peer_stream, 4);
        put_reason(&payload, (uint16_t)code, error);
        put_frame(c, GOAWAY, 0, 0, payload.data, payload.length, NULL, 0);
        wrenn_free(&payload);
        snprintf(c->error, sizeof c->error, "the connection is over: %s", error);
    }
    c->step = OVER;
    return error;
}

/* The socket around it. */

const char *wrenn_error(const struct wrenn_client *c) { return c->error; }

static int fail(struct wrenn_client *c, const char *what) {
    if (c->step != OVER || !c->error[0])
        snprintf(c->error, sizeof c->error, "%s%s%s", what, errno ? ": " : "", errno ? strerror(errno) : "");
    return -1;
}

static int flush(struct wrenn_client *c) {
    size_t at = 0;
    while (at < c->output.length) {
        ssize_t n = send(c->socket, c->output.data + at, c->output.length - at, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return fail(c, "write to the connection");
        at += (size_t)n;
    }
    drop_front(&c->output, at);
    return c->output.failed ? fail(c, "no memory") : 0;
}

/* Writes what waits and reads once. */
static int pump(struct wrenn_client *c) {
    uint8_t buffer[65536];
    int waited = 0;
    ssize_t n;
    for (;;) {
        struct pollfd p = {c->socket, POLLIN, 0};
        int left = c->timeout_ms - waited, wait = left < PING_AFTER_MS ? left : PING_AFTER_MS, ready;
        errno = 0;
        if (flush(c)) return -1;
        if (c->step == OVER) return fail(c, "the connection is over");
        if (left <= 0) return fail(c, "no answer in time");
        ready = poll(&p, 1, wait);
        if (ready < 0 && errno != EINTR) return fail(c, "wait for the connection");
        if (ready > 0) break;
        waited += wait;
        if (c->step == READY) put_frame(c, PING, 0, 0, "\0\0\0\0\0\0\0\0", 8, NULL, 0);
    }
    n = recv(c->socket, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EINTR) return 0;
    if (n <= 0) return fail(c, n ? "read from the connection" : "the connection was closed");
    if (wrenn_receive(c, buffer, (size_t)n)) {
        flush(c);
        return -1;
    }
    return 0;
}

struct wrenn_client *wrenn_connect(const char *host, const char *port, const char *identity,
                                   const void *secret, size_t secret_length, int timeout_ms, char *error,
                                   size_t error_size) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *addresses = NULL;
    struct timeval timeout = {timeout_ms / 1000, timeout_ms % 1000 * 1000};
    struct wrenn_client *c = NULL;
    uint8_t nonce[18];
    int one = 1, fd = -1;
    FILE *random = fopen("/dev/urandom", "rb");
    if (!random || fread(nonce, sizeof nonce, 1, random) != 1) {
        snprintf(error, error_size, "read /dev/urandom: %s", strerror(errno));
        if (random) fclose(random);
        return NULL;
    }
    fclose(random);
    if (getaddrinfo(host, port, &hints, &addresses)) {
        snprintf(error, error_size, "cannot resolve %s", host);
        return NULL;
    }
    for (struct addrinfo *a = addresses; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        if (fd < 0) continue;
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (connect(fd, a->ai_addr, a->ai_addrlen)) {
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(addresses);
    if (fd < 0 || !(c = wrenn_new(identity, secret, secret_length, "wrenn-c/1", nonce))) {
        snprintf(error, error_size, "connect: %s", strerror(errno));
        if (fd >= 0) close(fd);
        return NULL;
    }
    c->socket = fd;
    c->timeout_ms = timeout_ms;
    while (c->step != READY)
        if (pump(c)) {
            snprintf(error, error_size, "%s", c->error);
            wrenn_close(c);
            return NULL;
        }
    return c;
}

void wrenn_close(struct wrenn_client *c) {
    if (!c) return;
    if (c->socket >= 0) close(c->socket);
    while (c->first) {
        struct item *item = c->first;
        c->first = item->next;
        free(item);
    }
    free(c->current);
    if (c->secret.data) memset(c->secret.data, 0, c->secret.length);
    wrenn_free(&c->secret);
    wrenn_free(&c->input);
    wrenn_free(&c->output);
    wrenn_free(&c->first_bare);
    wrenn_free(&c->auth_message);
    free(c);
}

/* Number, body and empty extension list; -1 when they do not fit a frame. */
static int payload_of(struct wrenn_client *c, struct wrenn_buffer *payload, uint16_t kind, const struct wrenn_buffer *body) {
    errno = 0;
    wrenn_put_number(payload, kind, 2);
    if (body) wrenn_put(payload, body->data, body->length);
    wrenn_put_number(payload, 0, 2);
    if (payload->failed || (body && body->failed)) return fail(c, "no memory");
    return payload->length > MAX_PAYLOAD ? fail(c, "the message is longer than a frame") : 0;
}

uint32_t wrenn_open(struct wrenn_client *c, uint16_t kind, const struct wrenn_buffer *body, int fin) {
    struct wrenn_buffer payload = {0};
    struct stream *s = NULL;
    uint32_t id = 0, open = 0;
    int64_t cost;
    if (payload_of(c, &payload, kind, body)) goto out;
    cost = (int64_t)payload.length + FRAME_CHARGE;
    while (c->credit < cost)
        if (pump(c)) goto out;
    for (int i = 0; i < MAX_STREAMS; i++) {
        if (c->streams[i].id) open++;
        else s = &c->streams[i];
    }
    if (!s || open >= c->max_streams || c->going_away || c->step != READY) {
        fail(c, c->going_away ? "the peer is shutting down" : "too many streams are open");
        goto out;
    }
    id = c->next_stream;
    c->next_stream += 2;
    *s = (struct stream){id, c->stream_window, STREAM_WINDOW, 0, fin, 0};
    c->credit -= cost;
    put_frame(c, OPEN, id, fin, payload.data, payload.length, NULL, 0);
    if (flush(c)) id = 0;
out:
    wrenn_free(&payload);
    return id;
}

uint32_t wrenn_open_in(struct wrenn_client *c, const char *capsule_id, uint16_t kind,
                       const struct wrenn_buffer *body, int fin) {
    struct wrenn_buffer forward = {0};
    uint32_t id;
    wrenn_put_text(&forward, capsule_id);
    id = wrenn_open(c, WRENN_FORWARD, &forward, 0);
    wrenn_free(&forward);
    return id && wrenn_send(c, id, kind, body, fin) == 0 ? id : 0;
}

static struct stream *sendable(struct wrenn_client *c, uint32_t id) {
    struct stream *s = find(c, id);
    if (s && !s->sent_fin) return s;
    errno = 0;
    fail(c, "the stream has ended");
    return NULL;
}

int wrenn_send(struct wrenn_client *c, uint32_t id, uint16_t kind, const struct wrenn_buffer *body, int fin) {
    struct wrenn_buffer payload = {0};
    struct stream *s;
    int result = -1;
    if (payload_of(c, &payload, kind, body)) goto out;
    while ((s = sendable(c, id))) {
        int64_t cost = (int64_t)payload.length + FRAME_CHARGE;
        if (cost <= s->credit && cost <= c->credit) {
            s->credit -= cost;
            c->credit -= cost;
            put_frame(c, MESSAGE, id, fin, payload.data, payload.length, NULL, 0);
            s->sent_fin = fin;
            forget_if_done(s);
            result = flush(c);
            break;
        }
        if (pump(c)) break;
    }
out:
    wrenn_free(&payload);
    return result;
}

int wrenn_send_data(struct wrenn_client *c, uint32_t id, uint8_t channel, const void *data, size_t length) {
    const uint8_t *p = data;
    while (length > 0) {
        struct stream *s = sendable(c, id);
        int64_t room, share = MAX_WINDOW, held;
        size_t n;
        if (!s) return -1;
        held = c->stream_window - s->credit;
        if (c->credit < c->window / 2) share = 16384;
        if (c->credit < c->window / 4) share = 4096;
        if (c->credit < c->window / 8) share = 1024;
        room = s->credit < c->credit ? s->credit : c->credit;
        if (room > share - held) room = share - held;
        room -= FRAME_CHARGE + 1;
        if (room <= 0) {
            if (pump(c)) return -1;
            continue;
        }
        n = length < MAX_DATA ? length : MAX_DATA;
        if ((int64_t)n > room) n = (size_t)room;
        s->credit -= (int64_t)n + FRAME_CHARGE + 1;
        c->credit -= (int64_t)n + FRAME_CHARGE + 1;
        put_frame(c, DATA, id, 0, &channel, 1, p, n);
        if (flush(c)) return -1;
        p += n;
        length -= n;
    }
    return 0;
}

int wrenn_finish(struct wrenn_client *c, uint32_t id) {
    struct stream *s = sendable(c, id);
    if (!s) return -1;
    s->sent_fin = 1;
    put_frame(c, DATA, id, 1, NULL, 0, NULL, 0);
    forget_if_done(s);
    return flush(c);
}

int wrenn_cancel(struct wrenn_client *c, uint32_t id, const char *reason) {
    struct stream *s = find(c, id);
    struct wrenn_buffer payload = {0};
    struct item **at = &c->first;
    if (s) {
        s->id = 0;
        put_reason(&payload, 1, reason);
        put_frame(c, RESET, id, 0, payload.data, payload.length, NULL, 0);
        wrenn_free(&payload);
    }
    c->last = NULL;
    while (*at) {
        struct item *item = *at;
        if (item->stream == id) {
            *at = item->next;
            release(c, 0, item->cost);
            free(item);
        } else {
            c->last = item;
            at = &item->next;
        }
    }
    return flush(c);
}

int wrenn_next(struct wrenn_client *c, uint32_t id, struct wrenn_event *event) {
    for (;;) {
        struct item *before = NULL, *item = c->first;
        while (item && item->stream != id) {
            before = item;
            item = item->next;
        }
        if (item) {
            if (before) before->next = item->next;
            else c->first = item->next;
            if (c->last == item) c->last = before;
            release(c, id, item->cost);
            free(c->current);
            c->current = item;
            *event = item->event;
            return flush(c);
        }
        if (!find(c, id)) {
            errno = 0;
            return fail(c, "the stream has ended");
        }
        if (pump(c)) return -1;
    }
}
