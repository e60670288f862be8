// Package web is how stores that are reached over HTTP are connected to.
package web

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

// silence is for how long nothing may move on a connection that is used. A transfer may
// take as long as it wants to, if it goes on.
const silence = time.Minute

// Client verifies servers by these certificates (PEM) besides the system's.
func Client(ca []byte) (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(ca) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(ca) {
			return nil, errors.New("there is no certificate in it: PEM is expected")
		}
		config.RootCAs = pool
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	return &http.Client{Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &watched{Conn: conn, silence: silence}, nil
		},
		TLSClientConfig:       config,
		TLSHandshakeTimeout:   10 * time.Second,
		ForceAttemptHTTP2:     true,
		MaxIdleConns:          64,
		MaxIdleConnsPerHost:   32,
		IdleConnTimeout:       silence / 2,
		ExpectContinueTimeout: time.Second,
	}}, nil
}

// watched ends a connection on which nothing moves: a server, or what is between, that
// takes no more bytes and sends none is not noticed otherwise.
type watched struct {
	net.Conn
	silence time.Duration
}

func (c *watched) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.silence)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

func (c *watched) Write(p []byte) (int, error) {
	// For the answer, too: nobody answers before the last byte has come.
	if err := c.SetDeadline(time.Now().Add(c.silence)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// Classify gives what went wrong below HTTP the meaning that it has for a store. An
// error of a context that has ended is the context's.
func Classify(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ended := ctx.Err(); ended != nil {
		if errors.Is(err, ended) {
			return err
		}
		return fmt.Errorf("%w: %w", ended, err)
	}
	var untrusted *tls.CertificateVerificationError
	if errors.As(err, &untrusted) {
		return fmt.Errorf("%w: the server's certificate is not trusted (is the CA configured?): %w", backend.ErrDenied, err)
	}
	return err
}

// RetryAfter is for how long a server wants to be left alone, by the header of its
// answer; 0 if it does not say.
func RetryAfter(header http.Header) time.Duration {
	value := header.Get("Retry-After")
	if seconds, err := strconv.Atoi(value); err == nil && seconds > 0 {
		return time.Duration(min(seconds, 24*60*60)) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(0, time.Until(at)), 24*time.Hour)
	}
	return 0
}
