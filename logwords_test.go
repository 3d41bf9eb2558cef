package main

import (
	"log/slog"
	"strings"
	"testing"
	"time"
)

// A duration is a number of the same unit in both formats, which its name tells.
func TestLogsHaveDurationsInMillis(t *testing.T) {
	t.Parallel()
	for format, want := range map[string]string{"text": " duration_ms=90000\n", "json": `,"duration_ms":90000}` + "\n"} {
		var b logBuffer
		o := defaultOptions()
		o.logFormat = format
		newLogger(&b, o).Info("test", "duration", 90*time.Second-time.Microsecond)
		if !strings.HasSuffix(b.String(), want) {
			t.Errorf("%s: the line does not end in %q: %s", format, want, b.String())
		}
	}
}

// TestLogsHaveWords: a reason is a word in both formats of the log.
func TestLogsHaveWords(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"text", "json"} {
		var b logBuffer
		o := defaultOptions()
		o.logFormat = format
		newLogger(&b, o).LogAttrs(t.Context(), slog.LevelInfo, "test", slog.Any("leg", rolePhone),
			slog.Any("close", endHeartbeat), slog.Any("drop", dropPushWake), slog.Any("upgrade", upgradeRateLimited))
		for _, word := range []string{"phone", "heartbeat timeout", "push wake", "rate limited"} {
			if !strings.Contains(b.String(), word) {
				t.Errorf("%s: no %q in %s", format, word, b.String())
			}
		}
	}
}
