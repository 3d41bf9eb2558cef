package e2e

import (
	"bytes"
	"context"
	"fmt"
	"image/png"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"
)

// browser is a tab of a headless Chromium.
type browser struct {
	t   *testing.T
	ctx context.Context

	mu       sync.Mutex // guards what follows
	messages []string   // of the console, which has what the page throws and what is refused to it
	requests []string   // URLs
}

func startBrowser(t *testing.T) *browser {
	t.Helper()
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(tool(t, "chromium")),
		chromedp.NoSandbox, // which root may not have; it sees no page but ours
		chromedp.Flag("no-proxy-server", true))
	ctx, stop := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(stop)
	ctx, stop = chromedp.NewContext(ctx)
	b := &browser{t: t, ctx: ctx}
	b.do() // starts it
	var listeners sync.WaitGroup
	console, requests := chromedp.Console(ctx), cdp.Events(ctx, chromedp.FromContext(ctx).Target, network.RequestWillBeSent)
	listeners.Go(func() {
		for m := range console {
			b.note(&b.messages, fmt.Sprintf("%s: %s %s", m.Type, m.Text, m.URL))
		}
	})
	listeners.Go(func() {
		for e := range requests {
			if e.Request != nil {
				b.note(&b.requests, e.Request.URL)
			}
		}
	})
	t.Cleanup(func() {
		stop()
		listeners.Wait()
	})
	return b
}

func (b *browser) note(list *[]string, line string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	*list = append(*list, line)
}

// taken returns what is in a list since the last call.
func (b *browser) taken(list *[]string) (lines []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	lines, *list = *list, nil
	return lines
}

func (b *browser) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, steps...); err != nil {
		b.t.Fatal(err)
	}
}

// until waits for an expression to be true in the page.
func (b *browser) until(js string) {
	b.t.Helper()
	eventually(b.t, js, func() bool { return b.eval(js).(bool) })
}

// eval is what an expression is in the page, a primitive value.
func (b *browser) eval(js string) any {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, chromedp.Evaluate[any](js))
	if err != nil {
		b.t.Fatalf("%s: %v", js, err)
	}
	return v
}

// screenshot is of the whole page, for a person to look at: go test -artifacts
// keeps it. It has to show something, and no more than the width.
func (b *browser) screenshot(name, scheme string, width int64) {
	b.t.Helper()
	media := chromedp.Func(func(ctx context.Context, tab *chromedp.Target) error {
		_, err := cdp.Call(ctx, tab, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
		})
		return err
	})
	b.do(media, chromedp.EmulateViewport(width, 800, chromedp.EmulateScale(2)))
	if got := b.eval("document.documentElement.scrollWidth"); got != float64(width) {
		b.t.Errorf("%s: the page is %v pixels wide, want %d", name, got, width)
	}
	// A table that scrolls is not drawn where it is out of sight.
	height := int64(b.eval("document.documentElement.scrollHeight").(float64))
	b.do(chromedp.EmulateViewport(width, height, chromedp.EmulateScale(2)))
	shot, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.t.ArtifactDir(), name+".png"), shot, 0o600); err != nil {
		b.t.Fatal(err)
	}
	img, err := png.Decode(bytes.NewReader(shot))
	if err != nil {
		b.t.Fatal(err)
	}
	if r, g, bl, _ := img.At(2, 2).RGBA(); (r+g+bl)/3 > 0x8000 != (scheme == "light") {
		b.t.Errorf("%s: the background is %x %x %x", name, r>>8, g>>8, bl>>8)
	}
}

// keepPhone has a phone of serverID send frames of many sizes until the test ends.
// It dials again as soon as its connection ends.
func keepPhone(t *testing.T, addr, serverID string) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		var w wire
		var events chan event
		pace := time.NewTicker(10 * time.Millisecond)
		defer pace.Stop()
		for n := 0; ; n++ {
			select {
			case <-stop:
				if w != nil {
					w.drop()
				}
				return
			case <-pace.C:
			}
			for len(events) > 0 {
				if (<-events).ended {
					w = nil
				}
			}
			if w == nil {
				events = make(chan event, 1024)
				w, _ = gorillaLibrary.dial(urlOf("ws", addr, "/v2/client"), phoneHeaders(serverID), func(e event) { events <- e })
			} else if n%700 < 400 {
				w.send([]byte(quoted(strings.Repeat("a", 20+n%97*n%400)))) // its failure is an end, too
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-done
	})
}

// TestStatusPage: a browser shows what the relay does, on a wide screen and on a
// phone's, and across a restart.
func TestStatusPage(t *testing.T) {
	t.Parallel()
	listen, admin := freeAddr(t), freeAddr(t)
	flags := []string{"-listen", listen, "-admin", admin}
	r := startRelay(t, flags...)
	const home, lab = "7c9e6679-7425-40de-944b-e07fc1f90ae7", "f47ac10b-58cc-4372-a567-0e02b2c3d479"
	keepBinary(t, listen, home)
	keepBinary(t, listen, lab)
	keepPhone(t, listen, home)
	keepPhone(t, listen, lab)
	for _, code := range []int{1000, 1001, 3001} {
		gorillaLibrary.phone(t, listen, home).close(code, "")
	}
	gorillaLibrary.phone(t, listen, lab).wire.drop()
	gorillaLibrary.phone(t, listen, "nobody").wantEnd(4404, "server-id never seen")

	b := startBrowser(t)
	b.do(chromedp.Navigate("http://" + admin + "/"))
	b.until(`document.getElementById('summary').textContent.startsWith('all is well')`)
	b.until(`document.getElementById('binaries').textContent === '2' && document.getElementById('phones').textContent === '2'`)
	b.until(`document.getElementById('closed').rows.length === 5 && document.getElementById('refusals').rows.length === 1`)

	// The charts draw what the relay keeps, and go on.
	for _, path := range []string{".up", ".down"} {
		b.until(`[...document.querySelectorAll('#charts > div > svg > ` + path + `')].every(p => p.getAttribute('d').split('L').length > 2)`)
	}
	uptime := b.eval(`document.getElementById('uptime').textContent`)
	drawn := b.eval(`document.querySelector('.up').getAttribute('d')`)
	b.until(fmt.Sprintf(`document.getElementById('uptime').textContent !== %q`, uptime))
	b.until(fmt.Sprintf(`document.querySelector('.up').getAttribute('d') !== %q`, drawn))

	b.screenshot("light", "light", 1000)
	b.screenshot("dark", "dark", 1000)
	b.screenshot("phone", "light", 360)
	b.screenshot("phone-dark", "dark", 360)
	if messages := b.taken(&b.messages); messages != nil {
		t.Errorf("the console has: %q", messages)
	}

	r.stop()
	b.until(`document.body.className === 'gone'`)
	b.screenshot("gone", "light", 1000)
	r = startRelay(t, flags...)
	b.until(fmt.Sprintf(`document.getElementById('instance').textContent === %q && document.body.className === ''`, r.instance))
	b.until(`document.getElementById('restarted').textContent.startsWith('restarted')`)
	b.until(`document.getElementById('phones').textContent === '2'`)

	// While the relay was away, asking it failed, which the browser notes by itself.
	for _, m := range b.taken(&b.messages) {
		if !strings.Contains(m, "net::ERR_") {
			t.Errorf("the console has %q", m)
		}
	}
	requests := b.taken(&b.requests)
	if len(requests) < 5 {
		t.Errorf("the page has asked %d times: %q", len(requests), requests)
	}
	for _, url := range requests {
		if !strings.HasPrefix(url, "http://"+admin+"/") && !strings.HasPrefix(url, "data:") {
			t.Errorf("the page asks for %s", url)
		}
	}
}
