package main

import (
	"log/slog"
	"strings"
	"testing"
)

// TestLogsHaveWords: a reason is a word in both formats of the log.
func TestLogsHaveWords(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"text", "json"} {
		var b logBuffer
		o := defaultOptions()
		o.logFormat = format
		newLogger(&b, o).LogAttrs(t.Context(), slog.LevelInfo, "test", slog.Any("leg", legPhone),
			slog.Any("close", endHeartbeat), slog.Any("drop", dropPushWake), slog.Any("upgrade", upgradeRateLimited))
		for _, word := range []string{"phone", "heartbeat timeout", "push wake", "rate limited"} {
			if !strings.Contains(b.String(), word) {
				t.Errorf("%s: no %q in %s", format, word, b.String())
			}
		}
	}
}
