package main

import "log/slog"

// Every word that tells why something ended or was left out, once. The same
// words stand in logs, metrics, close frames and docs/protocol.md.

// leg is a side of the relay: a connection of a binary or of a phone.
type role uint8

const (
	roleBinary role = iota
	rolePhone
	roleCount
)

var roleWords = [roleCount]string{"binary", "phone"}

func (role role) String() string { return roleWords[role] }

// closeReason says why a connection ended. Its word is the reason in logs and
// metrics and, where the relay closes, the text of the close frame.
type closeReason int8

// endNone: nothing has ended.
const endNone closeReason = -1

const (
	// The peer's own end.
	endPeerClosed closeReason = iota // it sent a close frame; the code is the peer's, 1005 if it gave none
	endPeerLost                      // TCP ended or broke without a close frame: 1006

	// Frame rules (RFC 6455 §5).
	endUnmasked        // §5.1: a client must mask
	endProxyClosed     // §5.1: a trusted proxy ended it with a close frame of its own, unmasked, as Caddy 2.6 does
	endReservedBit     // §5.2: no extension was negotiated
	endUnknownOpcode   // §5.2
	endBadControl      // §5.5: over 125 bytes or fragmented
	endStrayFragment   // §5.4: a continuation of nothing
	endInterleaved     // §5.4: a data frame inside a fragmented message
	endBadLength       // §5.2: not the shortest form, or the top bit set
	endBadClose        // §5.5.1, §7.4: payload of one byte, or a code that must not be sent
	endInvalidUTF8     // §8.1
	endNotJSON         // a phone's message is not exactly one JSON value
	endMessageTooBig   // more than -max-frame bytes
	endMessageTimeout  // not complete 30 s after its first byte
	endHeartbeat       // nothing heard for -ping after a ping
	endWriteTimeout    // took nothing for 10 s
	endBacklogFull     // a phone's queue reached -queue
	endMemoryLimit     // the whole process reached -queue-total
	endNeverSeen       // no binary has held this server-id since the relay started
	endLastHeld        // no binary holds it now, one did
	endBinaryGone      // a phone sent while its binary's claim was in grace
	endGraceExpired    // the binary did not come back
	endReclaimed       // a new connection of the binary took the claim
	endReplaced        // a phone of an incumbent that lost its claim
	endTakenOver       // an incumbent that did not answer lost its claim to a newcomer
	endAlreadyClaimed  // a live binary holds the server-id
	endTooManyPhones   // -max-phones
	endBinaryDirective // the binary asked for it; the code is the binary's
	endShutdown        // drain
	endInternal        // a state that cannot happen did
	closeReasonCount
)

var closeReasons = [closeReasonCount]struct {
	code uint16 // 0: the code comes from the peer
	word string
}{
	endPeerClosed:      {0, "closed by peer"},
	endPeerLost:        {1006, "connection lost"},
	endUnmasked:        {1002, "unmasked frame"},
	endProxyClosed:     {1002, "proxy closed"},
	endReservedBit:     {1002, "reserved bit set"},
	endUnknownOpcode:   {1002, "unknown opcode"},
	endBadControl:      {1002, "bad control frame"},
	endStrayFragment:   {1002, "stray continuation"},
	endInterleaved:     {1002, "data frame inside fragmented message"},
	endBadLength:       {1002, "bad frame length"},
	endBadClose:        {1002, "bad close frame"},
	endInvalidUTF8:     {1007, "invalid utf-8"},
	endNotJSON:         {1007, "not one json value"},
	endMessageTooBig:   {1009, "message too big"},
	endMessageTimeout:  {1011, "message timeout"},
	endHeartbeat:       {1011, "heartbeat timeout"},
	endWriteTimeout:    {1011, "write timeout"},
	endBacklogFull:     {1011, "phone backlog full"},
	endMemoryLimit:     {1011, "relay memory limit"},
	endNeverSeen:       {4404, "server-id never seen"},
	endLastHeld:        {4404, "server-id last held"},
	endBinaryGone:      {4404, "binary gone"},
	endGraceExpired:    {4404, "grace expired"},
	endReclaimed:       {4404, "binary reclaimed server-id"},
	endReplaced:        {4404, "binary replaced"},
	endTakenOver:       {1011, "claim taken over"},
	endAlreadyClaimed:  {4409, "server-id already claimed"},
	endTooManyPhones:   {4429, "too many phones"},
	endBinaryDirective: {0, "closed by binary"},
	endShutdown:        {1001, "shutting down"},
	endInternal:        {1011, "internal error"},
}

func (r closeReason) String() string {
	if r == endNone {
		return ""
	}
	return closeReasons[r].word
}

// code is the close code that goes with r, on the wire and in the close notice;
// 0 where the code is the peer's own.
func (r closeReason) code() uint16 { return closeReasons[r].code }

// dropReason says why an envelope of a binary went nowhere. Its leg lives on.
type dropReason int8

// dropNone: the envelope is good.
const dropNone dropReason = -1

const (
	dropNotEnvelope  dropReason = iota // not one JSON object in valid UTF-8
	dropNoConnID                       // missing, null or not a string
	dropUnknownConn                    // none of this binary's phones
	dropNoFrame                        // neither frame nor close_code
	dropBadCloseCode                   // not an integer, or one that must not be on the wire
	dropPushWake                       // a wake request, which this relay does not serve
	dropReasonCount
)

var dropWords = [dropReasonCount]string{
	dropNotEnvelope:  "not an envelope",
	dropNoConnID:     "conn_id missing",
	dropUnknownConn:  "conn_id unknown",
	dropNoFrame:      "frame missing",
	dropBadCloseCode: "close_code invalid",
	dropPushWake:     "push wake",
}

func (r dropReason) String() string { return dropWords[r] }

// upgradeOutcome says how a request on a WebSocket endpoint ended.
type upgradeOutcome uint8

const (
	upgradeAccepted    upgradeOutcome = iota // 101
	upgradeDraining                          // 503
	upgradeRateLimited                       // 429
	upgradeFull                              // 503: -max-connections
	upgradeBadHeader                         // 400: x-pyrycode-* or user-agent
	upgradeBadRequest                        // 400, 405, 426: the WebSocket handshake
	upgradeFailed                            // the socket was gone before the 101
	upgradeOutcomeCount
)

var upgradeWords = [upgradeOutcomeCount]string{
	upgradeAccepted:    "accepted",
	upgradeDraining:    "draining",
	upgradeRateLimited: "rate limited",
	upgradeFull:        "connection limit",
	upgradeBadHeader:   "bad header",
	upgradeBadRequest:  "bad handshake",
	upgradeFailed:      "failed",
}

func (o upgradeOutcome) String() string { return upgradeWords[o] }

// Logs in JSON have the words too, not the numbers.

func (role role) LogValue() slog.Value        { return slog.StringValue(role.String()) }
func (r closeReason) LogValue() slog.Value    { return slog.StringValue(r.String()) }
func (r dropReason) LogValue() slog.Value     { return slog.StringValue(r.String()) }
func (o upgradeOutcome) LogValue() slog.Value { return slog.StringValue(o.String()) }
