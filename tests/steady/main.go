// Steady places orders at a fixed rate over gRPC and over keep-alive HTTP/1.1, as Go's own clients do
// it, and tells how many calls failed. Nothing is retried but what those libraries retry by themselves,
// because the call has provably not reached a server: grpc-go after GOAWAY or REFUSED_STREAM, net/http
// on a connection that was closed before a byte of the request was written.
//
// It ends when its standard input does, or after -calls of each protocol, and prints JSON:
//
//	{"grpc": {"sent": 9, "failed": 1, "errors": {"why": 1}}, "http": {…}}
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// How long one call may take; far longer than any should.
const patience = 30 * time.Second

// PlaceRequest{product_id: "book"} on the wire.
var place = []byte("\x0a\x04book")

// raw hands messages through as they are on the wire.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (raw) Name() string                       { return "proto" }

// tally is what one protocol's callers did.
type tally struct {
	Sent   int            `json:"sent"`
	Failed int            `json:"failed"`
	Errors map[string]int `json:"errors"`
	mutex  sync.Mutex
}

func (t *tally) note(err error) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.Sent++
	if err != nil {
		t.Failed++
		t.Errors[err.Error()]++
	}
}

// run lets callers call in turn, evenly spread, until done is closed or all calls were made.
func run(callers, rate, calls int, done <-chan struct{}, call func(caller int) error) *tally {
	result := &tally{Errors: map[string]int{}}
	interval := time.Duration(callers) * time.Second / time.Duration(rate)
	var begun atomic.Int64
	var running sync.WaitGroup
	for caller := range callers {
		running.Go(func() {
			select {
			case <-time.After(interval * time.Duration(caller) / time.Duration(callers)):
			case <-done:
				return
			}
			pace := time.NewTicker(interval)
			defer pace.Stop()
			for calls == 0 || begun.Add(1) <= int64(calls) {
				result.note(call(caller))
				select {
				case <-pace.C:
				case <-done:
					return
				}
			}
		})
	}
	running.Wait()
	return result
}

// overGRPC calls Place; four callers share a connection.
func overGRPC(target string, callers int, security *tls.Config) (func(int) error, error) {
	creds := insecure.NewCredentials()
	if security != nil {
		creds = credentials.NewTLS(security)
	}
	var channels []*grpc.ClientConn
	for range (callers + 3) / 4 {
		channel, err := grpc.NewClient("passthrough:///"+target,
			grpc.WithTransportCredentials(creds), grpc.WithDisableRetry(), grpc.WithDisableServiceConfig())
		if err != nil {
			return nil, err
		}
		channels = append(channels, channel)
	}
	return func(caller int) error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		var answer []byte
		return channels[caller/4].Invoke(ctx, "/orders.v1.OrderService/Place", &place, &answer, grpc.ForceCodec(raw{}))
	}, nil
}

// overHTTP posts to /product; each caller has a connection of its own.
func overHTTP(target string, callers int, security *tls.Config) func(int) error {
	scheme := "http"
	if security != nil {
		scheme = "https"
	}
	clients := make([]http.Client, callers)
	for i := range clients {
		clients[i] = http.Client{Timeout: patience, Transport: &http.Transport{TLSClientConfig: security}}
	}
	return func(caller int) error {
		url := scheme + "://" + target + "/product"
		response, err := clients[caller].Post(url, "application/json", strings.NewReader(`{"product_id":"book"}`))
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			return err
		}
		if response.StatusCode != http.StatusCreated {
			return fmt.Errorf("status %d", response.StatusCode)
		}
		return nil
	}
}

// security is the TLS of a client that trusts a CA, and shows a certificate if it has one.
func security(ca, cert, key, name string) (*tls.Config, error) {
	if ca == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: name}
	config.RootCAs.AppendCertsFromPEM(pem)
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

func main() {
	grpcTarget := flag.String("grpc", "", "HOST:PORT to place orders on over gRPC; none if empty")
	httpTarget := flag.String("http", "", "HOST:PORT to place orders on over HTTP/1.1; none if empty")
	rate := flag.Int("rate", 100, "calls per second over each protocol")
	callers := flag.Int("callers", 16, "callers of each protocol")
	calls := flag.Int("calls", 0, "calls over each protocol; 0: until standard input ends")
	ca := flag.String("ca", "", "PEM file of the CA to trust: speak TLS")
	cert := flag.String("cert", "", "PEM file of the client's certificate")
	key := flag.String("key", "", "PEM file of its key")
	name := flag.String("name", "", "the server's name in its certificate")
	flag.Parse()

	security, err := security(*ca, *cert, *key, *name)
	if err != nil {
		log.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(done)
	}()
	tallies := map[string]*tally{}
	var mutex sync.Mutex
	var running sync.WaitGroup
	start := func(protocol string, call func(int) error) {
		running.Go(func() {
			tally := run(*callers, *rate, *calls, done, call)
			mutex.Lock()
			defer mutex.Unlock()
			tallies[protocol] = tally
		})
	}
	if *grpcTarget != "" {
		call, err := overGRPC(*grpcTarget, *callers, security)
		if err != nil {
			log.Fatal(err)
		}
		start("grpc", call)
	}
	if *httpTarget != "" {
		start("http", overHTTP(*httpTarget, *callers, security))
	}
	running.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(tallies); err != nil {
		log.Fatal(err)
	}
}
