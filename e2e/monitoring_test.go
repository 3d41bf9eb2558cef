package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// prometheus is one that watches a relay.
type prometheus struct{ addr string }

// startPrometheus scrapes a relay's admin address twice a second, with the
// alerts of docs/deploy/rules.yml.
func startPrometheus(t testing.TB, admin string) prometheus {
	t.Helper()
	dir, addr := t.TempDir(), freeAddr(t)
	rules, err := filepath.Abs("../docs/deploy/rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	config := writeFile(t, filepath.Join(dir, "prometheus.yml"), fmt.Sprintf(`
global:
  scrape_interval: 500ms
  scrape_timeout: 500ms
  evaluation_interval: 200ms
rule_files: [%q]
scrape_configs:
  - job_name: pyrycode-relay
    static_configs:
      - targets: [%q]
`, rules, admin))
	p := start(t, exec.Command(tool(t, "prometheus"), "--config.file="+config, "--storage.tsdb.path="+dir+"/data",
		"--web.listen-address="+addr, "--log.level=warn"), func(string) {})
	awaitListener(t, p, addr)
	eventually(t, "prometheus is ready", func() bool {
		resp, err := http.Get("http://" + addr + "/-/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return prometheus{addr}
}

// get decodes the data of an answer; an error of Prometheus's is returned.
func (p prometheus) get(t testing.TB, path string, data any) error {
	t.Helper()
	resp, err := http.Get("http://" + p.addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return fmt.Errorf("%s, and no JSON: %w", resp.Status, err)
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s", answer.Error)
	}
	return nil
}

// samples is how many an expression has now.
func (p prometheus) samples(t testing.TB, expr string) (int, error) {
	t.Helper()
	var data struct {
		ResultType string
		Result     []json.RawMessage
	}
	err := p.get(t, "/api/v1/query?query="+url.QueryEscape(expr), &data)
	return len(data.Result), err
}

// wantSamples waits for some of each expression.
func (p prometheus) wantSamples(t *testing.T, exprs []string) {
	t.Helper()
	for _, expr := range exprs {
		eventually(t, "a value of "+expr, func() bool {
			n, err := p.samples(t, expr)
			if err != nil {
				t.Fatalf("%s: %v", expr, err)
			}
			return n > 0
		})
	}
}

// exprs are the values of the key "expr" in JSON, as Grafana would send them.
func exprs(v any, instance string) (all []string) {
	switch v := v.(type) {
	case map[string]any:
		for key, inner := range v {
			if s, ok := inner.(string); ok && key == "expr" {
				all = append(all, strings.NewReplacer("$instance", instance, "$__rate_interval", "5s").Replace(s))
			} else {
				all = append(all, exprs(inner, instance)...)
			}
		}
	case []any:
		for _, inner := range v {
			all = append(all, exprs(inner, instance)...)
		}
	}
	return all
}

// TestMonitoring: each expression of docs/deploy/grafana.json has values while a
// relay works, each alert of docs/deploy/rules.yml looks at series that a relay
// has, and fires only once there is a reason.
func TestMonitoring(t *testing.T) {
	t.Parallel()
	admin := freeAddr(t)
	r := startRelay(t, "-admin", admin)
	p := startPrometheus(t, admin)

	pair(t, gorillaLibrary, coderLibrary, r.addr, "home")

	b, err := os.ReadFile("../docs/deploy/grafana.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard any
	if err := json.Unmarshal(b, &dashboard); err != nil {
		t.Fatal(err)
	}
	panels := exprs(dashboard, admin)
	if len(panels) < 20 {
		t.Errorf("docs/deploy/grafana.json has %d expressions", len(panels))
	}
	for i, expr := range panels {
		panels[i] = strings.TrimSuffix(expr, " > 0") // by which a panel leaves out what has not happened
	}
	p.wantSamples(t, panels)

	// The selectors of the alerts.
	var groups struct {
		Groups []struct {
			Rules []struct{ Name, Query, Health, State, LastError string }
		}
	}
	eventually(t, "the alerts are evaluated", func() bool {
		if err := p.get(t, "/api/v1/rules", &groups); err != nil {
			t.Fatal(err)
		}
		for _, g := range groups.Groups {
			for _, rule := range g.Rules {
				if rule.Health == "unknown" {
					return false
				}
			}
		}
		return true
	})
	selector := regexp.MustCompile(`(pyrycode_relay_\w+|\bup)(\{[^}]*\})?`)
	count := 0
	for _, g := range groups.Groups {
		for _, rule := range g.Rules {
			count++
			if rule.Health != "ok" || rule.State == "firing" {
				t.Errorf("alert %s is %s, %s %s", rule.Name, rule.State, rule.Health, rule.LastError)
			}
			p.wantSamples(t, selector.FindAllString(rule.Query, -1))
		}
	}
	if count < 10 {
		t.Errorf("docs/deploy/rules.yml has %d alerts", count)
	}

	r.stop()
	eventually(t, "an alert about a relay that is down", func() bool {
		n, err := p.samples(t, `ALERTS{alertname="RelayDown"}`)
		return err == nil && n == 1
	})
}

// get reads a JSON page.
func get(t *testing.T, url string) (fields map[string]any) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&fields); err != nil {
		t.Fatal(err)
	}
	return fields
}

// TestMonitoringSnippets: what the snippets of docs/operations.md read is in
// /healthz, and in /status.json, where Homepage reads it.
func TestMonitoringSnippets(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	admin := freeAddr(t)
	health := get(t, "http://"+startRelay(t, "-admin", admin).addr+"/healthz")
	status := get(t, "http://"+admin+"/status.json")
	read := regexp.MustCompile(`\[BODY\]\.(\w+)|field: (\w+)|query\n`+"`(\\w+)`").FindAllStringSubmatch(string(b), -1)
	if len(read) != 9 {
		t.Fatalf("docs/operations.md reads %d fields", len(read))
	}
	for _, m := range read {
		page := health
		if m[2] != "" {
			page = status
		}
		if _, ok := page[m[1]+m[2]+m[3]]; !ok {
			t.Errorf("docs/operations.md reads %q, which is not there: %v", m[1]+m[2]+m[3], page)
		}
	}
}
